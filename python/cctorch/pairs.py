from collections.abc import Iterable, Iterator

from torch import Tensor


def pairs(batches: Iterable[object], function: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The (inputs, targets) that a user's loader gives to `function`.

    Raises:
        TypeError: it gives something else. The message says how to make pairs of it.
    """
    for batch in batches:
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor)):
            found, remedy = _described(batch)
            raise TypeError(
                f"{function}: batches gives {found}, expected pairs (inputs, targets) of tensors: pass {remedy}"
            )
        yield batch[0], batch[1]


def _described(batch: object) -> tuple[str, str]:
    """It, and what makes pairs of such."""
    kind = type(batch).__name__
    if hasattr(batch, "keys"):  # dict, and what HuggingFace makes
        keys = list(map(repr, batch.keys()))
        chosen = keys if len(keys) == 2 else ["...", "..."]
        return f"a {kind} of {', '.join(keys)}", f"((batch[{chosen[0]}], batch[{chosen[1]}]) for batch in loader)"
    if isinstance(batch, tuple | list):
        content = ", ".join(type(item).__name__ for item in batch)
        return f"a {kind} of {len(batch)} ({content})", "((inputs, targets) for inputs, targets, *_ in loader)"
    return f"a {kind}", "[(inputs, targets)]"
