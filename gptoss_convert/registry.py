"""Loading plugins and choosing between what they offer. Nobody else talks to pluggy."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pluggy

from gptoss_convert import hookspecs
from gptoss_convert.errors import ConfigError, PluginError
from gptoss_convert.types import Codec, Format, ModelFamily, Recipe, Resharder, Validator

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import click

    from gptoss_convert.types import Config, Side

T = TypeVar("T")
SWITCH = "GPTOSS_CONVERT_PLUGINS"
KINDS = ("models", "codecs", "formats", "resharders", "validators", "recipes", "commands")


@dataclass(frozen=True)
class PluginInfo:
    """An installed plugin: where it comes from, and what went wrong with it, if anything."""

    name: str
    distribution: str
    version: str
    module: str
    error: str = ""


@dataclass(frozen=True)
class _Offer:
    plugin: str
    record: Any


class Registry:
    """What the loaded plugins offer, typed, with every conflict named.

    Args:
        points: entry points to load; those of the group ``gptoss_convert`` by default.
        disabled: names of plugins to leave out (``--no-plugin``).

    Attributes:
        plugins: all that were to be loaded, with what went wrong.
        unknown: names to switch on or off that no plugin has.

    The environment variable ``GPTOSS_CONVERT_PLUGINS`` limits loading to the names it lists;
    empty, it switches all plugins off.

    """

    def __init__(
        self, points: Iterable[EntryPoint] | None = None, disabled: Collection[str] = ()
    ) -> None:
        self._manager = pluggy.PluginManager(hookspecs.NAMESPACE)
        self._manager.add_hookspecs(hookspecs)
        self.plugins: list[PluginInfo] = []
        found = list(entry_points(group=hookspecs.NAMESPACE) if points is None else points)
        allowed = os.environ.get(SWITCH)
        wanted = None if allowed is None else allowed.replace(",", " ").split()
        self.unknown = sorted({*disabled, *(wanted or ())} - {p.name for p in found})
        for point in sorted(set(found), key=lambda p: (p.name, p.value)):
            if point.name not in disabled and (wanted is None or point.name in wanted):
                self._load(point)

    def _load(self, point: EntryPoint) -> None:
        """Load one entry point on its own, so that a broken plugin takes nobody down."""
        error, plugin = "", None
        try:
            plugin = point.load()
            self._manager.register(plugin, name=point.name)
        except (Exception, SystemExit) as problem:
            error = f"{type(problem).__name__}: {problem}"
            if plugin and self._manager.get_plugin(point.name) is plugin:
                self._manager.unregister(plugin)  # pluggy before 1.7 keeps the hooks it had seen
        dist = point.dist
        self.plugins.append(
            PluginInfo(
                point.name,
                dist.name if dist else "?",
                dist.version if dist else "?",
                point.value,
                error,
            )
        )

    @property
    def failures(self) -> list[PluginInfo]:
        """Plugins that did not load."""
        return [plugin for plugin in self.plugins if plugin.error]

    def _check_hooks(self) -> None:
        """A misspelt hook would silently do nothing; make it an error that names the right one."""
        for one, other in itertools.pairwise(self.plugins):  # sorted by name
            if one.name == other.name:
                raise PluginError(
                    f"{one.distribution} {one.version} and {other.distribution} {other.version} "
                    f"both have a plugin {one.name!r}; uninstall one of them"
                )
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            hook = str(error).split("'")[1]
            near = difflib.get_close_matches(hook, [f"gptoss_convert_{k}" for k in KINDS], 1)
            hint = f"did you mean {near[0]}" if near else "see gptoss_convert/hookspecs.py"
            name = self._manager.get_name(error.plugin)
            raise PluginError(
                f"plugin {name!r} implements the unknown hook {hook!r}; {hint}, "
                f"or leave it out with --no-plugin {name}"
            ) from None

    def _offers(self, kind: str) -> Iterator[_Offer]:
        self._check_hooks()
        for impl in getattr(self._manager.hook, f"gptoss_convert_{kind}").get_hookimpls():
            try:
                records = list(impl.function())
            except Exception as error:
                raise PluginError(
                    f"plugin {impl.plugin_name!r} failed in gptoss_convert_{kind}: {error!r}; "
                    f"mend it or leave it out with --no-plugin {impl.plugin_name}"
                ) from error
            yield from (_Offer(impl.plugin_name, record) for record in records)

    def _named(self, kind: str, type_: type[T]) -> dict[str, T]:
        """Records by name; two plugins that claim one name are an error, never a shadow."""
        found: dict[str, _Offer] = {}
        for offer in self._offers(kind):
            if not isinstance(offer.record, type_):
                raise PluginError(
                    f"plugin {offer.plugin!r} yields {type(offer.record).__name__} from "
                    f"gptoss_convert_{kind}, which takes {type_.__name__}; mend it or leave it "
                    f"out with --no-plugin {offer.plugin}"
                )
            name = cast("Any", offer.record).name
            if (other := found.get(name)) is not None:
                raise PluginError(
                    f"{self._origin(other)} and {self._origin(offer)} both offer {name!r} "
                    f"({kind}); leave one out with --no-plugin {offer.plugin}"
                )
            found[name] = offer
        return {name: offer.record for name, offer in found.items()}

    def names(self, kind: str) -> list[str]:
        """What is on offer of a kind, as far as it can be told where plugins are at odds."""
        found = set()
        with contextlib.suppress(PluginError):
            found |= {str(getattr(offer.record, "name", "?")) for offer in self._offers(kind)}
        return sorted(found)

    def _origin(self, offer: _Offer) -> str:
        info = next(p for p in self.plugins if p.name == offer.plugin and not p.error)
        return f"plugin {info.name!r} of {info.distribution} {info.version}"

    def models(self) -> dict[str, ModelFamily]:
        """Model families by name."""
        return self._named("models", ModelFamily)

    def codecs(self) -> dict[str, Codec]:
        """Codecs by name."""
        return self._named("codecs", Codec)

    def formats(self, side: Side | None = None) -> dict[str, Format]:
        """Formats by name, of one side if given."""
        every = self._named("formats", Format)
        return {name: f for name, f in every.items() if side in (None, f.side)}

    def resharders(self) -> dict[str, Resharder]:
        """Resharders by name."""
        return self._named("resharders", Resharder)

    def validators(self) -> dict[str, Validator]:
        """Validators by name."""
        return self._named("validators", Validator)

    def recipes(self) -> dict[str, Recipe]:
        """Recipes by name."""
        return self._named("recipes", Recipe)

    def commands(self) -> dict[str, click.Command]:
        """Commands by name."""
        import click

        return self._named("commands", click.Command)

    def model_for(self, config: Config, name: str | None = None) -> ModelFamily:
        """The one family that answers to a config's architectures, or the named one."""
        wanted = config.get("architectures") or []
        if not isinstance(wanted, list):
            raise ConfigError(
                f"config.json: architectures is {wanted!r} and no list; restore the model's own "
                f"config.json"
            )
        return self._choose(
            "models",
            self.models(),
            lambda family: any(
                name in family.architectures for name in wanted if isinstance(name, str)
            ),
            name,
            f"the architecture {', '.join(map(str, wanted)) or '(none named in config.json)'}",
        )

    def codec_for(self, config: Config, name: str | None = None) -> Codec | None:
        """The codec a config declares, or the named one; None if it declares none."""
        quantization = config.get("quantization_config") or {}
        if not isinstance(quantization, dict):
            raise ConfigError(
                f"config.json: quantization_config is {quantization!r} and no object; restore the "
                f"model's own config.json"
            )
        declared = quantization.get("quant_method")
        if quantization and not declared:
            raise ConfigError(
                "config.json: quantization_config does not say its quant_method; restore the "
                "model's own config.json"
            )
        if name is None and not declared:
            return None
        what = f"the quantization {declared!r}"
        found = self._choose("codecs", self.codecs(), lambda c: c.matches(config), name, what)
        fitting = [other for other, codec in self.codecs().items() if codec.matches(config)]
        if fitting and found.name not in fitting:
            raise ConfigError(
                f"--codec {found.name}: config.json declares {what}, which is "
                f"{_names(fitting)}; leave --codec out"
            )
        return found

    def _choose(
        self,
        kind: str,
        all_: dict[str, T],
        matches: Callable[[T], bool],
        name: str | None,
        what: str,
    ) -> T:
        """Exactly one must match; ``name`` decides, and silent shadowing never does."""
        flag = f"--{kind.removesuffix('s')}"
        if name is not None:
            if name not in all_:
                raise PluginError(f"{flag} {name}: there is none; there are {_names(all_)}")
            return all_[name]
        hits = {n: record for n, record in all_.items() if matches(record)}
        if len(hits) == 1:
            return next(iter(hits.values()))
        if hits:
            origins = [self._origin(o) for o in self._offers(kind) if o.record.name in hits]
            raise PluginError(
                f"{' and '.join(origins)} all answer to {what}; choose with {flag} {_names(hits)}"
            )
        raise PluginError(
            f"no installed plugin knows {what}; there are {kind} {_names(all_)}; "
            f"install a plugin for it, or say {flag} NAME if one of them fits"
        )

    def format_of(
        self, folder: Any, side: Side | None = None, name: str | None = None
    ) -> Format | None:
        """The one format that recognises a folder, or the named one; None if none does.

        A name of the other side is not meant for this folder.
        """
        every, known = self.formats(side), self.formats()
        if name is not None and name not in known:
            raise PluginError(f"--format {name}: there is none; there are {_names(known)}")
        if name not in every:
            name = None
        if name is None and not any(f.detect(folder) for f in every.values()):
            return None
        return self._choose("formats", every, lambda f: f.detect(folder), name, str(folder))


def _names(records: Iterable[str]) -> str:
    return " or ".join(sorted(records)) or "none"


@cache
def default_registry() -> Registry:
    """The registry of all installed plugins, loaded once."""
    return Registry()
