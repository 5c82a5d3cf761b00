"""The choice of a decoder on a GPU, tried in a process of its own."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from loaders import probe
from loaders.pipeline import Graph


@pytest.mark.parametrize(
    "usable, expected",
    [
        ({("mixed", True), ("mixed", False)}, ("mixed", True)),
        ({("mixed", False)}, ("mixed", False)),
        (set(), ("cpu", True)),
    ],
)
def test_the_first_usable_decoder_is_taken(monkeypatch, usable, expected):
    monkeypatch.setattr(probe, "works", lambda decoder, region: (decoder, region) in usable)
    graph = probe.default_graph("cuda", 3)
    assert (graph.decoder, graph.region) == expected
    assert graph.device == "cuda" and graph.num_threads == 3


def test_the_cpu_needs_no_probe(monkeypatch):
    monkeypatch.setattr(probe, "works", lambda *_: pytest.fail("probed"))
    assert probe.default_graph("cpu", 2) == Graph(num_threads=2)


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
    found = probe.codes(probe.default_graph("cuda", 4), stream)
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
