"""Options that several commands share, and the types of their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Bytes(click.ParamType[int]):
    """A size such as 512MiB, 2GB or 1073741824."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Text -> bytes."""
        if isinstance(value, int):
            return value
        text = value.strip().upper().removesuffix("B")
        base = 1024 if text.endswith("I") else 1000
        text = text.removesuffix("I")
        power = "KMGT".find(text[-1:]) + 1 if text[-1:].isalpha() else 0
        try:
            size = int(float(text.rstrip("KMGT")) * base**power)
        except (ValueError, OverflowError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is no size; write it as 512MiB or 2GB", param, ctx)
        return size


class Folder(click.ParamType[Path]):
    """A folder's path; an empty one is a variable that was not set."""

    name = "dir"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """Text -> path."""
        if not str(value).strip():
            self.fail("is empty; name a folder", param, ctx)
        return Path(value)


class Checkpoint(click.ParamType[str]):
    """A folder or hub id; an empty one is a variable that was not set, and not this folder."""

    name = "dir|id"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Text -> the same."""
        if not str(value).strip():
            self.fail("is empty; name a folder or a hub id", param, ctx)
        return str(value)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator that adds several options, in this order."""

    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


DTYPES = click.Choice(["bfloat16", "float16", "float32", "bf16", "fp16", "fp32"])
hf_model_option = click.option(
    "--hf-model",
    "--hf-model-id",
    "--hf-model-path",
    type=Checkpoint(),
    metavar="DIR|ID",
    help="Hugging Face folder or hub id.",
)
revision_option = click.option(
    "--hf-revision", metavar="REV", help="Branch, tag or commit of a hub id."
)
megatron_option = click.option(
    "--megatron-path",
    "--megatron-load-path",
    "--megatron-model-path",
    type=Folder(),
    help="Megatron checkpoint: root or iter_* folder.",
)
hf_path_option = click.option("--hf-path", type=Folder(), help="Hugging Face folder to write.")
output_option = click.option("--output", type=Folder(), help="Megatron folder that reshard writes.")
torch_dtype_option = click.option(
    "--torch-dtype",
    type=DTYPES,
    help="Element type to write; the source's if left out.",
)
export_dtype_option = click.option(
    "--export-dtype",
    metavar="TYPE|CODEC",
    help="bfloat16, float16, float32, or a codec to write in (mxfp4); the checkpoint's element "
    "type if left out.",
)
scales_option = click.option(
    "--scales-from",
    type=Checkpoint(),
    metavar="DIR|ID",
    help="Checkpoint with the scales the weights once had; those that the import kept, if left out.",
)
keep_scales_option = click.option(
    "--keep-scales/--no-keep-scales",
    default=True,
    show_default=True,
    help="Keep a quantized source's scales beside the Megatron checkpoint (1.6 % of its size), so "
    "that an export can give its bytes back.",
)


class Assignment(click.ParamType[tuple[str, str]]):
    """``NAME=VALUE``."""

    name = "name=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        """Text -> name and value."""
        if isinstance(value, tuple):
            return value
        name, equals, setting = value.partition("=")
        if not (name and equals):
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name.replace("-", "_"), setting


decode_options = together(
    click.option(
        "--codec-backend",
        metavar="NAME",
        help="What the codec computes with: auto (default), triton, numba, table, reference.",
    ),
    click.option(
        "--codec-option",
        type=Assignment(),
        multiple=True,
        help="Any option of the codec (repeatable).",
    ),
)
encode_options = together(
    click.option(
        "--scale-rule",
        metavar="NAME",
        help="How the codec chooses a block's scale: even (default), floor, round_up.",
    ),
    click.option(
        "--on-nonfinite",
        metavar="NAME",
        help="What the codec does with NaN and infinity: error (default), nan, saturate.",
    ),
)
common_options = together(
    click.option("--model", metavar="NAME", help="Model family, where several would do."),
    click.option("--codec", metavar="NAME", help="Codec, where several would do."),
    click.option("--format", "format_", metavar="NAME", help="Format, where several would do."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Accepted, never needed: no code is run."
    ),
    click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout."),
    click.option("--debug", is_flag=True, help="Show where an error comes from."),
)
run_options = together(
    click.option("--workers", type=click.IntRange(1), help="Layers written side by side."),
    click.option(
        "--max-memory", type=Bytes(), default="1GiB", show_default=True, help="Bytes in flight."
    ),
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        default="cpu",
        show_default=True,
        help="Where to decode, rewrite and encode.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace the checkpoint at the target."),
    click.option("--no-progress", is_flag=True, help="No progress on stderr."),
)


computing_options = together(
    click.option(
        "--device",
        type=click.Choice(["cpu", "cuda"]),
        help="Where models run; CUDA where there is one.",
    ),
    click.option(
        "--torch-dtype", type=DTYPES, help="Of the models; bfloat16 on a GPU, else float32."
    ),
)


class Numbers(click.ParamType[tuple[int, ...]]):
    """``6,7,7,4``."""

    name = "n,n,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """Text -> whole numbers."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() for part in parts):
            self.fail(f"{value!r} is no list of numbers such as 6,7,7,4", param, ctx)
        return tuple(map(int, parts))


def _size(*names: str, text: str) -> Callable[[F], F]:
    return click.option(*names, type=click.IntRange(1), default=1, show_default=True, help=text)


sizes_options = together(
    _size(
        "--tp", "--tensor-parallel-size", "--tensor-model-parallel-size", text="Tensor parallel."
    ),
    _size(
        "--pp",
        "--pipeline-parallel-size",
        "--pipeline-model-parallel-size",
        text="Pipeline stages.",
    ),
    _size(
        "--ep", "--expert-parallel-size", "--expert-model-parallel-size", text="Expert parallel."
    ),
    _size(
        "--etp",
        "--expert-tensor-parallel-size",
        text="Tensor parallel within experts.",
    ),
)
layout_options = together(
    sizes_options,
    _size("--vpp", "--virtual-pipeline-model-parallel-size", text="Model chunks per stage."),
    click.option(
        "--decoder-first-pipeline-num-layers",
        "first",
        type=click.IntRange(0),
        help="Layers of the first stage, if not as many as the others have.",
    ),
    click.option(
        "--decoder-last-pipeline-num-layers",
        "last",
        type=click.IntRange(0),
        help="Layers of the last stage, if not as many as the others have.",
    ),
    click.option(
        "--pipeline-layers",
        "stages",
        type=Numbers(),
        default=(),
        help="Layers of every stage (with --vpp of every chunk, in the order of the layers).",
    ),
    click.option(
        "--make-vocab-size-divisible-by",
        "vocab_multiple",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Pad the vocabulary to a multiple of this times --tp (Megatron-LM's default is 128).",
    ),
    click.option(
        "--dialect",
        metavar="NAME",
        help="How the format names things. torch_dist: stacked (default) or per-layer keys. torch: "
        "te-grouped (default), te-sequential, local-sequential or local-grouped modules.",
    ),
)
