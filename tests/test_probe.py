"""The choice of a decoder on a GPU, tried in a process of its own."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from loaders import probe
from loaders.pipeline import Graph


def rates(**by_name):
    """A measurement that gives a graph the rate of its decoder; whole frames on the GPU a tenth more."""

    def measure(graph):
        return by_name[graph.decoder] * (1.0 if graph.region or graph.decoder == "cpu" else 1.1)

    return measure


@pytest.mark.parametrize(
    "usable, measured, expected",
    [
        ({True, False}, dict(cpu=10, mixed=20, shared=15), ("mixed", False)),
        ({True}, dict(cpu=10, mixed=20, shared=15), ("mixed", True)),
        ({True, False}, dict(cpu=30, mixed=20, shared=15), ("cpu", True)),
        ({True, False}, dict(cpu=10, mixed=20, shared=25), ("shared", False)),
        (set(), dict(cpu=10), ("cpu", True)),
    ],
)
def test_the_fastest_usable_decoder_is_taken(monkeypatch, caplog, usable, measured, expected):
    monkeypatch.setattr(probe, "works", lambda decoder, region: region in usable)
    with caplog.at_level(logging.INFO):
        graph = probe.choose_graph("cuda", 3, "auto", rates(**measured))
    assert (graph.decoder, graph.region) == expected
    assert graph.device == "cuda" and graph.num_threads == 3
    chosen = [line for line in caplog.messages if "chosen" in line]
    assert len(chosen) == 1 and chosen[0].startswith(f"decoder {graph.decoder} (")
    assert len(caplog.messages) == 1 + len(usable) + bool(usable)  # CPU, each GPU graph, both at once


def test_both_decoders_get_what_their_rates_promise(monkeypatch):
    monkeypatch.setattr(probe, "works", lambda decoder, region: region)
    graph = probe.choose_graph("cuda", 3, "shared", rates(cpu=10, mixed=30, shared=1))
    assert graph.decoder == "shared" and graph.mixed_share == 0.75


def test_where_whole_frames_are_decoded_no_decoder_of_regions_is_tried(monkeypatch):
    """It would decode whole frames with a decoder that was only found to work on regions."""
    monkeypatch.setattr(probe, "works", lambda decoder, region: region)
    measured = rates(cpu=10, mixed=20, shared=30)
    assert probe.choose_graph("cuda", 3, "auto", measured, whole_frames=True) == Graph("cuda", num_threads=3)
    assert probe.choose_graph("cuda", 3, "auto", measured).decoder == "shared"


def test_a_named_decoder_is_taken_or_refused(monkeypatch):
    monkeypatch.setattr(probe, "works", lambda decoder, region: not region)
    assert probe.choose_graph("cuda", 3, "cpu", None) == Graph("cuda", num_threads=3)
    graph = probe.choose_graph("cuda", 3, "mixed", rates(cpu=99, mixed=1))
    assert (graph.decoder, graph.region) == ("mixed", False)
    monkeypatch.setattr(probe, "works", lambda *_: False)
    with pytest.raises(ValueError, match="data.decoder=mixed: the GPU decoder does not work here"):
        probe.choose_graph("cuda", 3, "mixed", rates(cpu=99))


def test_the_cpu_needs_no_probe(monkeypatch):
    monkeypatch.setattr(probe, "works", lambda *_: pytest.fail("probed"))
    assert probe.choose_graph("cpu", 2, "auto", None) == Graph(num_threads=2)


def test_a_decoder_that_ends_its_process_or_hangs_is_unusable(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for command, reason in (
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit code -11"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("raise SystemExit('differs')", "exit code 1: differs"),
    ):
        monkeypatch.setattr(probe, "_TIMEOUT_S", 1 if "sleep" in command else 60)
        run = subprocess.run
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(
                probe.subprocess, "run", lambda _, run=run, c=command, **o: run([sys.executable, "-c", c], **o)
            )
            assert not probe.works.__wrapped__("mixed", True)
        assert f"GPU decoder mixed with region=True is unusable here: {reason}" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("stream", ["temporal", "spatial"])
@pytest.mark.parametrize("decoder", ["mixed", "cpu"])
def test_whole_frames_decoded_for_the_gpu_agree_with_the_cpu(decoder, stream):
    found = probe.codes(Graph("cuda", decoder, region=False), stream)
    assert np.abs(found - probe.codes(Graph(), stream)).max() <= probe.TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("stream", ["temporal", "spatial"])
def test_the_chosen_graph_agrees_with_the_cpu(stream):
    """Regions too, where the GPU decoder can; where it cannot, the graph that is taken instead."""
    graph = probe.choose_graph("cuda", 4, "auto", lambda graph: {"cpu": 1, "mixed": 2, "shared": 3}[graph.decoder])
    found = probe.codes(graph, stream)
    assert np.abs(found - probe.codes(Graph(), stream)).max() <= probe.TOLERANCE


@pytest.mark.parametrize("stream, shape", [("temporal", (640, 1, 224, 224)), ("spatial", (320, 3, 224, 224))])
def test_the_probes_batches_are_large_and_not_flat(stream, shape):
    codes = probe.codes(Graph(), stream)
    assert codes.shape == shape
    assert codes.std(axis=(2, 3)).min() > 5 and len(np.unique(codes.mean(axis=(1, 2, 3)))) > 100


def test_contradicting_devices_are_refused():
    with pytest.raises(ValueError, match="decoder='mixed' decodes on a GPU"):
        Graph("cpu", "mixed")
    with pytest.raises(ValueError, match="is 'cpu' or 'cuda'"):
        Graph("tpu")
    with pytest.raises(ValueError, match="mixed_share=1.5 is a part of the images"):
        Graph("cuda", "shared", mixed_share=1.5)
