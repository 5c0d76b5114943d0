"""The adapters that a server has mounted, and what the name of a model means."""

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.config import CarrierName, MountConfig, ServeConfig
from trimtab.errors import AdapterError, InputError
from trimtab.mount import is_kept, mount
from trimtab.serving.work import UnknownModel
from trimtab.steering.mounted import Mounted
from trimtab.steering.processor import DEFAULT_CARRIERS, mixture_of, open_live
from trimtab.steering.several import Several
from trimtab.store.manifest import read_manifest
from trimtab.types import Progress, silent

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_STRENGTH = 2.0
_KEPT = 64
_LISTED = "GET /v1/models lists those that do"


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter that is mounted on the host.

    Attributes:
        name: What requests call it.
        mounted: Its seat.
        live: Expert and reference, where they are open.
        carriers: Those that can steer; they do unless a request says otherwise.
    """

    name: str
    mounted: Mounted
    live: Live | None
    carriers: tuple[CarrierName, ...]


@dataclass(frozen=True)
class Chosen:
    """An adapter as a request wants it.

    Attributes:
        adapter: The adapter.
        carriers: Which of its carriers steer.
        strength: How far to follow them, in (0, 2].
    """

    adapter: Loaded
    carriers: tuple[CarrierName, ...]
    strength: float


@final
class Adapters:
    """The adapters of a server. Requests in flight keep what they began with."""

    def __init__(self, config: ServeConfig, host: HFModel) -> None:
        """Begin without adapters.

        Args:
            config: How to mount them.
            host: The host.
        """
        self.host = host
        self.host_name = config.name or config.host
        self._config = config
        self._loaded: dict[str, Loaded] = {}
        self._mixed: OrderedDict[tuple[object, ...], Several] = OrderedDict()
        self._lock = threading.Lock()
        self._mounting = threading.Lock()

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        """In the order in which they came; one that is replaced keeps its place."""
        return tuple(self._loaded.values())

    def load(self, name: str, path: Path, *, progress: Progress = silent) -> Loaded:
        """Mount an adapter; one of the same name is replaced for requests to come.

        Args:
            name: What requests call it.
            path: Its folder.
            progress: Shows the mounting.

        Raises:
            InputError: The name cannot be one.
            AdapterError: The adapter is broken or does not fit the host.
            ModelError: Its small model cannot be opened, where the expert is to steer.
        """
        check_adapter_name(name)
        seat = self._seat(name, path)
        carriers = seat.carriers or ()
        with self._mounting:
            mounted = mount(seat, host=self.host, progress=progress)
            live = None
            if "expert" in carriers:
                small, dtype = self._config.small, self._config.dtype
                live = open_live(mounted, self.host, small=small, dtype=dtype, progress=progress)
        loaded = Loaded(name, mounted, live, carriers)
        with self._lock:
            self._loaded[name] = loaded
            self._mixed.clear()
        return loaded

    def is_seated(self, name: str, path: Path) -> bool:
        """Whether an adapter's seat on the host is kept, so that mounting it runs no model.

        Args and errors are those of `load`.
        """
        return is_kept(self._seat(name, path), self.host)

    def _seat(self, name: str, path: Path) -> MountConfig:
        """How an adapter is mounted."""
        config = self._config
        carried = tuple(read_manifest(path).carriers)
        wanted = config.carriers or tuple(c for c in DEFAULT_CARRIERS if c in carried)
        carriers: tuple[CarrierName, ...] = tuple(c for c in wanted if c in carried)
        if not carriers:
            raise AdapterError(
                f"the adapter {name} carries {', '.join(carried)}, and none of these is to steer",
                hint=f"serve with --carriers {','.join(carried)}",
            )
        seat = {"adapter": path, "host": config.host, "dtype": config.dtype}
        seat |= {"carriers": carriers, "host_keys": config.host_keys}
        return MountConfig.model_validate(seat)

    def unload(self, name: str) -> None:
        """Take an adapter away from requests to come.

        Raises:
            UnknownModel: There is none of this name.
        """
        with self._lock:
            if self._loaded.pop(name, None) is None:
                raise UnknownModel(f"there is no adapter {name!r}")
            self._mixed.clear()

    def model_names(self) -> list[str]:
        """Of the host alone, and of the host with each adapter."""
        return [self.host_name, *(f"{self.host_name}+{one.name}" for one in self.loaded)]

    def chosen(
        self, model: str, carriers: Sequence[CarrierName] | None, strength: float | None
    ) -> tuple[Chosen, ...]:
        """What a request's model means: HOST, HOST+NAME, HOST+NAME:STRENGTH+NAME:STRENGTH.

        Args:
            model: The name.
            carriers: Which carriers steer; None for all that are served.
            strength: Of adapters whose strength the name does not say; None is 1.

        Returns:
            The adapters that steer; those of strength 0 do not, and are left out.

        Raises:
            UnknownModel: The host or an adapter is not served.
            InputError: A strength is no number in [0, 2], an adapter is named twice, or carriers
                are asked for that are not served.
        """
        if model != self.host_name and not model.startswith(f"{self.host_name}+"):
            raise UnknownModel(f"the model {model!r} does not exist ({_LISTED})")
        found: list[Chosen] = []
        words = model.removeprefix(self.host_name)[1:]
        asked = strengths_of(words) if model != self.host_name else {}
        for name, said in asked.items():
            loaded = self._loaded.get(name)
            if loaded is None:
                raise UnknownModel(
                    f"the model {model!r} does not exist: no adapter {name!r} is loaded ({_LISTED})"
                )
            given = strength if said is None else said
            steers = _carriers(loaded, carriers)
            found.append(Chosen(loaded, steers, 1.0 if given is None else given))
        return tuple(one for one in found if one.strength)

    def plain_name(self, model: str) -> str:
        """The name of a model that is served, without strengths: of these there are few."""
        parts = model.removeprefix(self.host_name).split("+")
        names = sorted(part.partition(":")[0] for part in parts if part)
        return "+".join([self.host_name, *names])

    def mixture(self, chosen: Sequence[Chosen]) -> Several:
        """What steers; the same object for requests that want the same, which are asked together.

        Args:
            chosen: At least one adapter.
        """
        key = tuple((one.adapter, one.carriers, one.strength) for one in chosen)
        with self._lock:
            found = self._mixed.pop(key, None) or Several(
                tuple(
                    mixture_of(
                        self.host, one.adapter.mounted, one.carriers, one.strength, one.adapter.live
                    )
                    for one in chosen
                )
            )
            # One that was exchanged or taken away meanwhile steers this request, and is not kept.
            if all(self._loaded.get(one.adapter.name) is one.adapter for one in chosen):
                self._mixed[key] = found
            while len(self._mixed) > _KEPT:
                self._mixed.popitem(last=False)
            return found


def check_adapter_name(name: str) -> None:
    """Make sure that requests can say an adapter's name.

    Raises:
        InputError: They cannot.
    """
    if not ADAPTER_NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot be the name of an adapter in requests",
            hint="use at most 64 letters, digits, dots, dashes and underscores",
        )


def strengths_of(words: str) -> dict[str, float | None]:
    """Read which adapters are asked for: NAME, NAME:STRENGTH, or several with + between them.

    Args:
        words: What a request says.

    Returns:
        Strengths by name, in the order of the words; None where the words do not say.

    Raises:
        InputError: A strength is no number in [0, 2], or an adapter is named twice.
    """
    found: dict[str, float | None] = {}
    for part in words.split("+"):
        name, said, number = part.partition(":")
        if name in found:
            raise InputError(f"{words} names {name} twice", hint="name each adapter once")
        found[name] = _strength(words, number) if said else None
    return found


def _strength(words: str, number: str) -> float:
    try:
        strength = float(number)
    except ValueError:
        strength = -1.0
    if not 0 <= strength <= MAX_STRENGTH:
        raise InputError(
            f"{words!r} gives the strength {number!r}",
            hint=f"give a number from 0 to {MAX_STRENGTH:g} after the colon",
        )
    return strength


def _carriers(loaded: Loaded, asked: Sequence[CarrierName] | None) -> tuple[CarrierName, ...]:
    if asked is None:
        return loaded.carriers
    missing = [name for name in asked if name not in loaded.carriers]
    if missing or not asked:
        raise InputError(
            f"the adapter {loaded.name} is served with {', '.join(loaded.carriers)}, and"
            f" {', '.join(missing) or 'nothing'} was asked for",
            hint=f"ask for carriers among {', '.join(loaded.carriers)}",
        )
    return tuple(name for name in loaded.carriers if name in asked)
