"""The choice of a decoder on a GPU, tried in a process of its own."""

import logging

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_decoder_that_ends_its_process_is_reported_as_unusable(caplog):
    probe.works.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not probe.works("mixed", True)
    assert "GPU decoder mixed with region=True is unusable here (exit code" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("decoder, region", [("mixed", True), ("mixed", False), ("cpu", True)])
def test_gpu_decoders_agree_with_the_cpu(decoder, region):
    """On a machine whose GPU decoder cannot do regions, the probe must have said so."""
    if not probe.works(decoder, region):
        assert decoder == "mixed" and probe.default_graph("cuda", 2) != Graph("cuda", decoder, region, 2)
        return
    found = probe.codes(Graph("cuda", decoder, region))
    assert np.abs(found - probe.codes(Graph())).max() <= probe.TOLERANCE


def test_the_probes_batch_is_large_and_not_flat():
    codes = probe.codes(Graph())
    assert codes.shape == (640, 1, 224, 224)
    assert codes.std(axis=(1, 2, 3)).min() > 5 and len(np.unique(codes.mean(axis=(1, 2, 3)))) > 100


def test_contradicting_devices_are_refused():
    with pytest.raises(ValueError, match="decoder='mixed' decodes on a GPU"):
        Graph("cpu", "mixed")
    with pytest.raises(ValueError, match="is 'cpu' or 'cuda'"):
        Graph("tpu")
