"""Planning what is written in a codec's form, and binding a codec to the options a user set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from gptoss_convert.errors import UsageError, blame

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gptoss_convert.plan import Output, Step
    from gptoss_convert.types import Codec, Config, ModelFamily, TensorSpec


T = TypeVar("T")


def bind(codec: Codec, options: Mapping[str, str]) -> Codec:
    """The codec with its options set.

    Raises:
        UsageError: it has no such option or value, or cannot meet it on this machine.

    """
    for name, value in options.items():
        if name not in codec.options:
            known = f"it has {', '.join(codec.options)}" if codec.options else "it has none"
            raise UsageError(f"codec {codec.name} has no option {name!r}; {known}")
        if value not in codec.options[name]:
            choices = ", ".join(codec.options[name])
            raise UsageError(f"codec {codec.name}: {name} is {value!r}; choose {choices}")
    if not options:
        return codec
    if codec.check is not None:
        try:
            codec.check(**options)
        except ValueError as error:
            raise UsageError(f"codec {codec.name}: {error}") from None

    def bound(function: Callable[..., T] | None) -> Callable[..., T] | None:
        return function and partial(function, **options)

    return replace(
        codec,
        decode=partial(codec.decode, **options),
        decode_contiguous=bound(codec.decode_contiguous),
        encode=bound(codec.encode),
        load=bound(codec.load),
    )


@dataclass(frozen=True)
class Encoding:
    """How to write what the mapping table calls quantizable.

    Attributes:
        codec: with its options bound.
        options: those options.
        hints: specs of the parts a source once had, by stored name.
        hints_of: the checkpoint they are of, for messages.

    """

    codec: Codec
    options: Mapping[str, str] = field(default_factory=dict)
    hints: Mapping[str, TensorSpec] = field(default_factory=dict)
    hints_of: str = ""

    def encoded(self, step: Step, problems: list[str]) -> Step:
        """The step with its outputs in the codec's form, if its rule wants that."""
        if not step.rule.quantizable:
            return step
        problems += [
            f"{i.name}: is F64, which a codec would have to round twice; write it as float32 first"
            for i in step.inputs
            if i.spec.dtype == "F64"
        ]
        outputs = tuple(self._output(o, problems) for o in step.outputs)
        return replace(step, outputs=outputs, units=step.units if self.codec.sliceable else 1)

    def _output(self, output: Output, problems: list[str]) -> Output:
        codec = self.codec
        assert codec.parts is not None
        with blame(f"codec {codec.name}"):
            try:
                specs = codec.parts(output.spec)
            except ValueError as error:
                text = f"{output.name}: {error}; write the checkpoint in BF16 instead"
                problems.append(text)
                return output
        parts = {output.name + s: spec for s, spec in zip(codec.suffixes, specs, strict=True)}
        hints = tuple(output.name + s for s in codec.hints)
        return replace(
            output, codec=codec, parts=tuple(parts.items()), hints=hints if self.hints else ()
        )

    def unfit_hints(self, steps: Sequence[Step]) -> list[str]:
        """What keeps the hints from serving for these steps."""
        wanted = (
            (name, dict(output.parts)[name])
            for step in steps
            for output in step.outputs
            for name in output.hints
        )
        problems = []
        for name, spec in wanted:
            found = self.hints.get(name)
            if found is None:
                problems.append(f"{name}: is not there; name a checkpoint that is whole")
            elif found != spec:
                problems.append(
                    f"{name}: is {found} where {spec} is due, so it is another model's; name the "
                    f"checkpoint that the weights came from"
                )
        return problems

    def declaration(self, config: Config, family: ModelFamily) -> Mapping[str, Any]:
        """The ``quantization_config``: the source's own, if it declares this codec."""
        assert self.codec.declare is not None
        if self.codec.matches(config):
            return cast("Mapping[str, Any]", config["quantization_config"])
        with blame(f"codec {self.codec.name}"):
            return self.codec.declare(family.unquantized)

    def to_json(self) -> dict[str, str]:
        """Name and options, the first choice where none was made."""
        defaults = {name: choices[0] for name, choices in self.codec.options.items()}
        return {"codec": self.codec.name, **defaults, **self.options}
