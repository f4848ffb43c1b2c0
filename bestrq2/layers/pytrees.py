"""Data classes of tensors as trees: wrappers of modules (DDP with a static graph, FSDP2) look into them."""

from dataclasses import fields
from typing import Any, TypeVar

import torch.utils._pytree as pytree

Kind = TypeVar("Kind", bound=type)


def tree_of_tensors(*constants: str) -> Any:
    """Decorate a data class: ``torch.utils._pytree`` finds the tensors in its fields, nested ones too.

    Wrappers that do not know a class take it for a constant and pass by the gradients of what it holds.

    Args:
        constants: fields that are no part of the tree, such as sizes.
    """

    def decorate(kind: Kind) -> Kind:
        names = [field.name for field in fields(kind)]
        children = [name for name in names if name not in constants]

        def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(value, name) for name in children], tuple(getattr(value, name) for name in constants)

        def unflatten(values: Any, context: Any) -> Any:
            return kind(**dict(zip(children, values)), **dict(zip(constants, context)))

        def flatten_with_keys(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
            values, context = flatten(value)
            return [(pytree.GetAttrKey(name), child) for name, child in zip(children, values)], context

        name = f"{kind.__module__}.{kind.__qualname__}"
        pytree.register_pytree_node(
            kind, flatten, unflatten, serialized_type_name=name, flatten_with_keys_fn=flatten_with_keys
        )
        return kind

    return decorate
