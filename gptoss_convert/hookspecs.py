"""Every hook a plugin may implement. This is the first file to read when writing a plugin.

A plugin is a module (or object) named in the entry-point group ``gptoss_convert``::

    [project.entry-points.gptoss_convert]
    mymodel = "my_package.my_module"

Each hook yields frozen records from :mod:`gptoss_convert.types`. Hook modules import only
``gptoss_convert`` and ``click`` at the top; torch and the like belong inside the callbacks, so
that ``gptoss-convert --help`` stays fast. docs/plugins.md builds a whole plugin on one page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    import click

    from gptoss_convert.types import (
        Codec,
        Format,
        ModelFamily,
        Recipe,
        Resharder,
        Validator,
    )

NAMESPACE = "gptoss_convert"
hookspec = pluggy.HookspecMarker(NAMESPACE)
hookimpl = pluggy.HookimplMarker(NAMESPACE)


@hookspec
def gptoss_convert_models() -> Iterable[ModelFamily]:  # type: ignore[empty-body]
    """Yield the model families this plugin can map.

    Example::

        @hookimpl
        def gptoss_convert_models():
            yield ModelFamily(
                name="tiny-glu",
                architectures=frozenset({"TinyGluForCausalLM"}),
                rules=lambda config: [
                    Rule({"model.norm.weight": (config["hidden_size"],)},
                         "decoder.final_layernorm.weight"),
                ],
                megatron_config=lambda config: {"num_layers": config["num_hidden_layers"]},
                hf_config=lambda mg: {"num_hidden_layers": mg["num_layers"]},
            )
    """


@hookspec
def gptoss_convert_codecs() -> Iterable[Codec]:  # type: ignore[empty-body]
    """Yield the quantized storage forms this plugin can decode, and perhaps encode.

    docs/codecs.md explains one; ``gptoss_convert.testing.assert_codec`` tries yours.

    Example::

        from gptoss_convert.errors import EncodeError

        def encode(tensor, hints=None, out=None):
            rows = tensor.float().flatten(1)
            if not rows.isfinite().all():
                broken = rows.isfinite().all(1).logical_not().nonzero()
                raise EncodeError(int(broken[0]), "holds NaN or infinity; mend the checkpoint")
            scale = 2.0 ** (rows.abs().amax(1, keepdim=True).frexp().exponent - 7)
            return (rows / scale).round().clamp(-127, 127).char(), scale

        def spec(parts):
            rows, scale = parts
            if (rows.dtype, scale) != ("I8", TensorSpec((*rows.shape[:1], 1), "F32")):
                raise ValueError(f"{rows} and {scale} are not I8 [out, in] and F32 [out, 1]")
            return TensorSpec(rows.shape, "BF16")

        @hookimpl
        def gptoss_convert_codecs():
            yield Codec(
                name="int8-rowwise",
                suffixes=("_int8", "_scale"),
                matches=lambda config: (
                    (config.get("quantization_config") or {}).get("quant_method") == "int8-rowwise"
                ),
                spec=spec,
                decode=lambda parts, out=None: (parts[0].float() * parts[1]).bfloat16(),
                encode=encode,
                parts=lambda logical: (
                    TensorSpec(logical.shape, "I8"), TensorSpec((logical.shape[0], 1), "F32")
                ),
                declare=lambda modules: {"quant_method": "int8-rowwise", "skip": list(modules)},
            )
    """


@hookspec
def gptoss_convert_formats() -> Iterable[Format]:  # type: ignore[empty-body]
    """Yield the ways of storing a checkpoint in a folder that this plugin can read and write.

    Example::

        @hookimpl
        def gptoss_convert_formats():
            yield Format(
                name="one-file",
                side="megatron",
                detect=lambda folder: (folder / "weights.bin").is_file(),
                open=OneFileSource,
                create=OneFileSink,
            )
    """


@hookspec
def gptoss_convert_resharders() -> Iterable[Resharder]:  # type: ignore[empty-body]
    """Yield the axes of a parallel layout, each with how it cuts a parameter.

    Example::

        from gptoss_convert.layout import EVERYWHERE, Share

        def by_experts(parameter, layout):
            if not parameter.has_experts:
                return EVERYWHERE
            each = parameter.shape[0] // layout.ep
            return [Share(r, {0: ((r * each, (r + 1) * each),)}) for r in range(layout.ep)]

        @hookimpl
        def gptoss_convert_resharders():
            yield Resharder(name="ep", cut=by_experts)
    """


@hookspec
def gptoss_convert_validators() -> Iterable[Validator]:  # type: ignore[empty-body]
    """Yield checks that run with every conversion.

    Example::

        @hookimpl
        def gptoss_convert_validators():
            def small(plan):
                if plan.parameters > 10**12:
                    yield Finding("warning", plan.family, "more than 10^12 parameters")

            yield Validator(name="small", stage="plan", check=small)
    """


@hookspec
def gptoss_convert_recipes() -> Iterable[Recipe]:  # type: ignore[empty-body]
    """Yield named training configurations.

    Example::

        @hookimpl
        def gptoss_convert_recipes():
            yield Recipe("tiny_pretrain", "Runs anywhere", build=lambda **kw: {"seq": 64, **kw})
    """


@hookspec
def gptoss_convert_commands() -> Iterable[click.Command]:  # type: ignore[empty-body]
    """Yield click commands to hang below ``gptoss-convert``.

    Example::

        @click.command()
        def hello():
            "Say hello."
            click.echo("hello")

        @hookimpl
        def gptoss_convert_commands():
            yield hello
    """
