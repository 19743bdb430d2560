"""Where a conversion computes has no influence on what it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_convert.convert import Conversion, prepare_export, prepare_import
from gptoss_convert.device import Device, working_on
from gptoss_convert.errors import UsageError
from gptoss_convert.layout import Layout
from gptoss_convert.loss import Loss
from gptoss_convert.opening import Choice
from gptoss_convert.recode import prepare_dequantize, prepare_quantize
from gptoss_convert.reshard import prepare_reshard
from gptoss_convert.scratch import Scratch, page_aligned

Tree = Callable[[Path], dict[str, str]]


def conversions(originals: dict[str, Path], folder: Path) -> Iterator[tuple[str, Conversion]]:
    """One of every kind; those that read what another writes come after it."""
    imported = folder / "mxfp4 in"
    yield "mxfp4 in", prepare_import(originals["mxfp4"])
    yield "bf16 in", prepare_import(originals["bf16"])
    yield "bf16 in as float32", prepare_import(originals["bf16"], torch_dtype="float32")
    yield "bf16 out", prepare_export(imported)
    yield "mxfp4 out", prepare_export(imported, export_dtype="mxfp4")
    yield "mxfp8 out", prepare_export(imported, export_dtype="mxfp8")
    yield "dequantized", prepare_dequantize(originals["mxfp4"])
    yield "quantized", prepare_quantize(originals["bf16"], "mxfp4")
    yield "per layer", prepare_reshard(imported, dialect="per-layer")
    files = Choice(format="torch")
    yield "per rank", prepare_reshard(imported, layout=Layout(tp=2, ep=5), choice=files)


def check(
    originals: dict[str, Path], tmp_path: Path, tree: Tree, device: str, monkeypatch: Any = None
) -> None:
    for name, conversion in conversions(originals, tmp_path):
        one = conversion.run(tmp_path / name)
        with monkeypatch.context() if monkeypatch else _nothing() as patch:
            if patch:
                patch.setattr("gptoss_convert.conversion.working_on", _elsewhere)
            other = conversion.run(tmp_path / f"{name} there", device=device)
        assert tree(tmp_path / f"{name} there") == tree(tmp_path / name), name
        assert other.losses.keys() == one.losses.keys()
        for tensor, loss in one.losses.items():
            assert _numbers(other.losses[tensor]) == pytest.approx(_numbers(loss), rel=1e-5), tensor


def _numbers(loss: Loss) -> list[float]:
    """What it says; sums depend on the order in which a device adds."""
    return [float(v or 0) for v in loss.to_json().values() if not isinstance(v, str)]


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


class Elsewhere(Device):
    """A CPU that plays a GPU: what was read is not used where it lies, memory is its own."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.threads = 0

    def memory(self) -> Scratch:
        def allocate(nbytes: int) -> Tensor:
            self.taken.append(nbytes)
            return page_aligned(nbytes)

        return Scratch(allocate)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self.threads += 1
        yield

    def here(self, tensor: Tensor) -> Tensor:
        moved = tensor.clone()
        return moved

    def to_write(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous()


_used: list[Elsewhere] = []


@contextmanager
def _elsewhere(name: str) -> Iterator[Device]:
    _used.append(Elsewhere())
    yield _used[-1]
    assert _used[-1].threads


def test_a_device_of_ones_own(
    originals: dict[str, Path], tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    _used.clear()
    check(originals, tmp_path, tree, "elsewhere", monkeypatch)
    assert len(_used) == 10
    assert sum(bool(device.taken) for device in _used) >= 4  # all that decode or encode


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(originals: dict[str, Path], tmp_path: Path, tree: Tree) -> None:
    check(originals, tmp_path, tree, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_is_pinned_while_a_gpu_is_at_work() -> None:
    with working_on("cuda") as device:
        assert Scratch().take(5000).is_pinned()
        assert device.memory().take(5000).is_cuda
    assert not Scratch().take(5000).is_pinned()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu(originals: dict[str, Path], tmp_path: Path, invoke: Any) -> None:
    with pytest.raises(UsageError, match="--device cpu"), working_on("cuda"):
        pass
    words = ("--hf-model", originals["bf16"], "--megatron-path", tmp_path / "out")
    done = invoke("import", *words, "--device", "cuda")
    assert done.returncode == 2
    assert "finds no GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []
