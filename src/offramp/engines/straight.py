"""Layers as the calls of torch that they come down to, without the modules around them.

On few tokens a layer spends as much time in Python, between the calls of torch, as a small exit
takes: modules call modules, look for hooks and sort out options that never change. So layers are
run on a few examples, and what all of these have in common becomes one straight function (`calls`).
It makes the same calls in the same order with the same values, so not one bit differs.

All layers stay as they are where one of them is no layer of transformers or torch, looks at values
in Python, or where anything has a hook, which should hear of no example. One layer does where its
examples differ in more than sizes, for inputs longer than these and under autocast, and for good
as soon as anything is done to its parts or its config. Not noticed is what changes outside of a
layer's own objects: a patched class or function, another function in a registry.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from offramp.backbones import Backbone, Flow, example_rows
from offramp.engines.calls import Course, Run, Varies, follow, written

logger = logging.getLogger("offramp")

# rows and tokens of the examples; what is longer than the longest is not run straight
_PADDED = ((6, 2), (3, 11), (1, 60))
_TEXTS = (*_PADDED, (1, 128))
_IMAGES = ((3, 0), (1, 0))
_MAKERS = ("torch.nn.", "transformers.", "offramp.")
"""Whose layers do nothing but call torch."""
_HARMLESS = "transformers.utils.output_capturing"
"""Its hooks do nothing unless hidden states are asked for, which is never."""

Key = tuple[Any, ...]
Parts = list[Mapping[Any, Any]]


class Straight:
    """A backbone whose layers become straight.

    Attributes:
        backbone: the same on the same weights; its layers are straight once `find` was called.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._plain = backbone
        self._known: Known = {}
        self._lock = threading.Lock()
        self.backbone = backbone
        through = getattr(type(backbone), "through", None)  # its own: a wrapper would be left out
        self._found = through is None
        if through is not None:
            self.backbone = through(backbone, lambda layer: _Layer(layer, self._known))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy finds its own; what was found is bound to the weights of this one."""
        return type(self), (self._plain,)

    def find(self) -> None:
        """Make layers straight, once; call it before any clock starts."""
        if self._found or _autocast(_device(self._plain)):
            return
        with self._lock:
            if not self._found:
                self._known.update(find(self._plain))
                self._found = True


class _Straight(NamedTuple):
    fits: Run  # (hidden, given) -> whether it is for these sizes
    run: Run  # (hidden, given) -> what the layer gives
    parts: Parts
    state: Parts  # what they were

    def same(self) -> bool:
        """Whether nothing was done to the layer."""
        try:
            # equal values give equal answers, and what is one and the same is not compared
            return self.parts == self.state
        except (RuntimeError, ValueError):  # another tensor, another array
            return False


class _Layer:
    """Runs a layer, straight where that is known."""

    def __init__(self, layer: nn.Module, known: Known) -> None:
        self._layer, self._known = layer, known

    def __call__(self, hidden: Tensor, **given: Any) -> Any:
        straight = self._known.get(id(self._layer), {}).get(key_of(hidden, given))
        if straight is None or _autocast(hidden.device) or not straight.fits(hidden, given):
            return self._layer(hidden, **given)
        if not straight.same():
            logger.debug(
                "Something was done to a %s: it runs as it is.", type(self._layer).__name__
            )
            self._known.pop(id(self._layer), None)  # it holds weights that may be no more
            return self._layer(hidden, **given)
        return straight.run(hidden, given)


Known = dict[int, dict[Key, _Straight]]
"""Straight functions of layers, by the id of the layer and `key_of`."""


def _autocast(device: torch.device) -> bool:
    known = torch.amp.is_autocast_available(device.type)  # not on meta, where offloaded weights are
    return known and torch.is_autocast_enabled(device.type)


def _device(backbone: Backbone) -> torch.device:
    return next(backbone.layers.parameters(), torch.empty(0)).device


@torch.inference_mode()
def find(backbone: Any) -> Known:
    """The straight functions of a backbone's layers."""
    watch = _Watch()
    watching = backbone.through(watch.over)
    if _is_heard(backbone) or not all(map(_is_plain, watch.layers)):
        return {}
    try:
        for batch in _examples(backbone):
            watch.example += 1
            flow: Flow = watching.embed(batch)
            for number in range(1, backbone.depth + 1):
                flow = watching.layer(number, flow)
    except Exception as problem:  # what is to save time must not end a run
        logger.debug("Layers stay as they are: %s", problem)
        return {}
    found: Known = {}
    for (place, key), seen in watch.seen.items():
        try:
            fits, run = written([*seen.courses.values()])
            _check(run, seen)
        except Exception as problem:
            logger.debug("A %s stays as it is: %s", type(seen.layer).__name__, problem)
        else:
            parts = parts_of(seen.layer)
            one = _Straight(fits, run, parts, [dict(part) for part in parts])
            found.setdefault(place, {})[key] = one
    return found


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was seen of a layer: an input, and what it did with the first of each example."""

    layer: nn.Module
    hidden: Tensor
    given: Mapping[str, Any]
    courses: dict[int, Course] = field(default_factory=dict)


class _Watch:
    """Runs layers and looks at what they do."""

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.example = 0
        self.seen: dict[tuple[int, Key], _Seen] = {}

    def over(self, layer: nn.Module) -> Run:
        self.layers.append(layer)
        return partial(self._run, layer)

    def _run(self, layer: nn.Module, hidden: Tensor, **given: Any) -> Any:
        key = (id(layer), key_of(hidden, given))
        seen = self.seen.setdefault(key, _Seen(layer, hidden, given))
        course, said = follow(layer, hidden, given)
        seen.courses.setdefault(self.example, course)
        return said


def _examples(backbone: Backbone) -> Iterator[Mapping[str, Tensor]]:
    device = _device(backbone)
    if backbone.reads == "image":
        sizes = [(rows, tokens, False) for rows, tokens in _IMAGES]
    else:
        sizes = [
            (*one, padded) for padded in (False, True) for one in (_PADDED if padded else _TEXTS)
        ]
    for rows, tokens, padded in sizes:
        length = min(tokens, backbone.max_length or tokens)
        yield example_rows(backbone, rows, length, device, padded)


def _check(run: Run, seen: _Seen) -> None:
    """On other values than those that it was found by, at the sizes of the first example."""
    other = seen.hidden.flip(-1) * 0.9
    wanted = tree_leaves(seen.layer(other, **seen.given))
    pairs = zip(wanted, tree_leaves(run(other, seen.given)), strict=True)
    if not all(torch.equal(one, two) for one, two in pairs if isinstance(one, Tensor)):
        raise Varies("it says something else")


# What a layer is called with, and what it is


def key_of(hidden: Tensor, given: Mapping[str, Any]) -> Key:
    """What decides which calls a layer makes, beside sizes."""
    return (hidden.dtype, hidden.device, *((name, _kind(one)) for name, one in given.items()))


def _kind(one: Any) -> Any:
    if isinstance(one, Tensor):
        return one.dtype, one.dim()
    if isinstance(one, tuple | list):
        return tuple(map(_kind, one))
    # what else there may be is never the same
    return (type(one), one) if one is None or isinstance(one, str | int | float) else object()


def parts_of(layer: nn.Module) -> Parts:
    """Where it would show that something was done to a layer."""
    module: Any = nn.modules.module
    parts: Parts = [module._global_forward_hooks, module._global_forward_pre_hooks]
    configs = {}
    for part in layer.modules():
        parts += [vars(part), part._modules, part._parameters, part._buffers]
        parts += [part._forward_hooks, part._forward_pre_hooks]
        if hasattr(config := vars(part).get("config"), "__dict__"):
            configs[id(config)] = vars(config)
    return [*parts, *configs.values()]


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is as its library made it; an adapter may change within, where none looks."""
    return all(
        type(part).__module__.startswith(_MAKERS)
        and not part.training
        and "forward" not in vars(part)
        and part._compiled_call_impl is None
        and not _hooked(part)
        for part in layer.modules()
    )


def _is_heard(backbone: Any) -> bool:
    """Whether something listens around the layers, which should hear of no example."""
    module: Any = nn.modules.module
    around = (one for one in vars(backbone).values() if isinstance(one, nn.Module))
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or any(_hooked(part) for one in around for part in one.modules())
    )


def _hooked(part: nn.Module) -> bool:
    hooks = (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", "") != _HARMLESS for hook in hooks)
