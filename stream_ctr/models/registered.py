"""Models of one's own beside the nine systems: how they are registered, adapted and checked.

A model is an `nn.Module` from first-order weights and embeddings to logits:

    class MyModel(nn.Module):
        def __init__(self, *, fields: int, embedding_dim: int): ...
        def forward(self, w, v): ...      # w [B, F], v [B, F, K] -> logits [B]

The constructor may take any of the keywords fields, embedding_dim, hidden, activation and dropout,
`forward` any of sums and generator (see `stream_ctr.models`). Others are left out.

Such a model takes one step a batch. It follows the online rule if it declares which `Terms` its
logit is the sum of, and has

    def deep_logits(self, w, v, *, generator=None, tape=None): ...    # the network's logits [B]

made of `Dense` layers, which keep on the tape what the rule needs. `check` compares both methods on
random numbers before a model learns anything.

>>> class Plain(nn.Module):
...     '''The sum of the first-order weights.'''
...     def forward(self, w, v):
...         return w.sum(dim=1)
>>> register_model(Plain, name="plain_example")
'plain_example'
>>> found = system("plain_example")
>>> found.says, found.module().forward(torch.ones(2, 3), torch.zeros(2, 3, 4), generator=None)
('The sum of the first-order weights.', tensor([3., 3.]))
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stream_ctr import extensions
from stream_ctr.errors import ConfigError
from stream_ctr.messages import one_line
from stream_ctr.models import MODELS, System
from stream_ctr.models.layers import Tape
from stream_ctr.models.products import pairwise_inner_products
from stream_ctr.models.terms import Terms

RESERVED = (
    *("blend", "ftrl", "ftrl_scaled", "ftrl_pairs", "ftrl_pairs_slow", "river_ftrl"),
    *MODELS,
)
"""Names that reports and files use for other models."""

_OPTIONS = ("fields", "embedding_dim", "hidden", "activation", "dropout")
_FORWARD = ("sums", "generator")
_NETWORK = ("generator", "tape")
_CHECKED_EXAMPLES = 3
_TOLERANCE = 1e-4


def register_model(model: type[nn.Module] | str, *, name: str | None = None) -> str:
    """Make a model known to this process, and return its name.

    `model` is a class, which is registered under `name` or the name of the class in lower case, or
    an import path `package.module:Class`, which is imported and registered as it is written. The
    name stands in reports and manifests: a process that serves the model registers it too.

    Raises `ConfigError` for a name that is taken or unfit, and for what is not an `nn.Module`.
    """
    if isinstance(model, str):
        found = extensions.import_class(model)
        name = name or model
    else:
        found = model
        name = name or model.__name__.lower()
    if name in RESERVED:
        raise ConfigError(f"the name {name!r} is that of another model; give it another one")
    if not extensions.is_name(name):
        raise ConfigError(
            f"{name!r:.80} is no name of a model: letters, digits, _ and ., or an import path"
        )
    extensions.register(name, _require_module(name, found))
    return name


def system(name: str) -> System:
    """Return the model of this name: one of the nine systems, a registered or an installed one.

    Raises `UnknownModel` if there is none, and `ConfigError` if it is not a model.
    """
    if name in MODELS:
        return MODELS[name]
    return _described(name, _require_module(name, extensions.find(name)))


def follows_online_rule(name: str) -> bool:
    """Return whether the model learns by the online rule, or takes one step a batch instead."""
    found = system(name)
    return found.module is None or hasattr(found.module, "terms")


def _require_module(name: str, model: object) -> type[nn.Module]:
    if not (isinstance(model, type) and issubclass(model, nn.Module)):
        raise ConfigError(f"model {name!r}: {one_line(repr(model), 80)} is not a torch.nn.Module")
    for method, keywords in (("forward", ()), ("deep_logits", _NETWORK)):
        if method == "deep_logits" and not _has_network(model):
            continue
        taken = _parameters(getattr(model, method, None))
        if len(taken) < 2 or not set(keywords) <= _accepted(taken, keywords):
            raise ConfigError(
                f"model {name!r}: it needs a method {method}(self, w, v"
                f"{', *, generator=None, tape=None' if keywords else ''})"
                f"{', because it declares terms with a network' if keywords else ''}"
            )
    return model


def _has_network(model: type[nn.Module]) -> bool:
    terms = getattr(model, "terms", None)
    return isinstance(terms, Terms) and terms.network


def _described(name: str, model: type[nn.Module]) -> System:
    """Return the model with its title, and the columns of Table 1 as its terms imply them."""
    terms = getattr(model, "terms", None)
    first_line = (model.__doc__ or "").strip().partition("\n")[0]
    return System(
        title=getattr(model, "title", model.__name__),
        module=_adapted(model),
        says=getattr(model, "says", first_line or f"{model.__module__}:{model.__qualname__}"),
        high_order=getattr(model, "high_order", terms is None or terms.network),
        low_order=getattr(model, "low_order", terms is not None and (terms.linear or terms.pairs)),
        engineering=getattr(model, "engineering", False),
    )


def _adapted(model: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass that leaves out the keywords that the model does not take.

    What its constructor raises becomes a `ConfigError`.
    """
    options = _accepted(_parameters(model.__init__), _OPTIONS)
    keywords = _accepted(_parameters(model.forward), _FORWARD)

    class Adapted(model):  # type: ignore[valid-type, misc]
        def __init__(self, **given: object) -> None:
            try:
                super().__init__(**_only(given, options))
            except Exception as error:  # whatever the code of the model does
                raise ConfigError(
                    f"model {model.__name__}: its constructor fails with the keywords "
                    f"{', '.join(sorted(options)) or 'none'}: "
                    f"{type(error).__name__}: {one_line(error)}"
                ) from error

        def forward(self, w: Tensor, v: Tensor, **given: object) -> Any:
            return super().forward(w, v, **_only(given, keywords))

    Adapted.__name__ = model.__name__
    Adapted.__qualname__ = model.__qualname__
    return Adapted


def _parameters(method: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a method without `self`; none for what has no signature."""
    if method is None or method is nn.Module.__init__:
        return {}
    parameters = dict(inspect.signature(method).parameters)
    parameters.pop("self", None)
    return parameters


def _accepted(parameters: Mapping[str, inspect.Parameter], names: Collection[str]) -> set[str]:
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return set(names)
    return set(names) & parameters.keys()


def _only(given: Mapping[str, object], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in names}


# -- the check -----------------------------------------------------------------------------------


def check(
    name: str, module: nn.Module, *, columns: int, embedding_dim: int, embeddings: int = 1
) -> None:
    """Raise `ConfigError` unless this new module is one that a learner can train.

    It runs on random numbers, on the CPU: logits are float32 [B], finite, the same each time, and
    have a gradient; parameters and buffers are float32 and do not change. With terms, the logit is
    their sum, and each parameter is that of a `Dense` layer with a tape.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        w = torch.randn(_CHECKED_EXAMPLES, columns).requires_grad_()
        v = torch.randn(_CHECKED_EXAMPLES, columns, embeddings * embedding_dim).requires_grad_()
        try:
            problem = _problem(module, w, v, embedding_dim)
        except ConfigError:
            raise
        except Exception as error:  # whatever the code of the model does
            raise ConfigError(
                f"model {name!r} fails on w {list(w.shape)} and v {list(v.shape)}: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
    if problem:
        raise ConfigError(f"model {name!r}: {problem}")


def _problem(module: nn.Module, w: Tensor, v: Tensor, embedding_dim: int) -> str | None:
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    for key, tensor in state.items():
        if tensor.dtype != torch.float32:
            return f"{key} is {tensor.dtype}; parameters and buffers are float32"
    logits = module(w, v)
    if not isinstance(logits, Tensor) or logits.shape != w.shape[:1]:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        return f"forward returns {shape} for {len(w)} examples; logits are [{len(w)}]"
    if logits.dtype != torch.float32 or not bool(logits.isfinite().all()):
        return f"logits are finite numbers of float32, got {logits.dtype}"
    if not logits.requires_grad:
        return "the logits have no gradient: they depend neither on w and v nor on a parameter"
    if not torch.equal(logits, module(w, v)):
        return (
            "forward returns something else each time; units are dropped by "
            "stream_ctr.models.layers.Dropout, with the generator that forward is given"
        )
    if any(not torch.equal(state[key], tensor) for key, tensor in module.state_dict().items()):
        return "forward changes a buffer, which threads share; BatchNorm is not supported"
    terms = getattr(module, "terms", None)
    return _problem_of_terms(module, terms, w, v, embedding_dim) if terms is not None else None


def _problem_of_terms(
    module: nn.Module, terms: object, w: Tensor, v: Tensor, embedding_dim: int
) -> str | None:
    if not isinstance(terms, Terms):
        return "`terms` is a stream_ctr.models.terms.Terms"
    total = torch.zeros(len(w))
    tape = Tape()
    if terms.linear:
        total = total + w.sum(dim=1)
    if terms.pairs:
        total = total + pairwise_inner_products(v[:, :, :embedding_dim])
    if terms.network:
        deep: Tensor = module.deep_logits(w, v, generator=None, tape=tape)  # type: ignore[operator]
        torch.autograd.grad(deep.sum(), (w, v), materialize_grads=True)
        total = total + deep
    if not torch.allclose(module(w, v), total, rtol=_TOLERANCE, atol=_TOLERANCE):
        return f"forward is not the sum of the {terms} that it declares"
    learned = {id(parameter) for layer in tape.layers for parameter in layer.parameters()}
    for key, parameter in module.named_parameters():
        if id(parameter) not in learned:
            return (
                f"the online rule would not learn the parameter {key}: only Dense layers that are "
                "called with the tape are; without `terms` the model takes one step a batch"
            )
    return None
