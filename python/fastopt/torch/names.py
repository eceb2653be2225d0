"""Names of tensors in the files of a model, and in the model that transformers makes."""

from __future__ import annotations

from typing import Any


def names_in(model: Any, names: list[str], rules: list[Any] | None = None) -> dict[str, str]:
    """Return the names that the tensors of a file have in a model, by the rules of ``from_pretrained``.

    Parameters
    ----------
    model : torch.nn.Module
        Others than those of transformers have the names of their files.
    names : list of str
    rules : list, optional
        Those of the model by default.
    """
    found = {name: name for name in names}
    if not hasattr(model, "base_model_prefix"):
        return found
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before version 5, transformers did not rename
        return found
    rules = get_model_conversion_mapping(model) if rules is None else rules
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known = model.state_dict()
    for name in names:
        found[name], merged = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if merged is not None:
            raise ValueError(f"{name!r}: this version of transformers merges it with others, so it cannot stay packed")
    return found
