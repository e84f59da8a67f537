"""YAML of a stranger: plain values only, and nothing that PyYAML takes in silence."""

from typing import Any

import yaml

from lightning_modules.errors import InputError


def load_yaml(text: str) -> Any:
    """Return what a YAML text says.

    Raises:
        InputError: If a key is given twice, or there is an alias; it begins with the line.
        yaml.YAMLError: If it is no YAML, or has tags beyond the plain ones.
    """
    # Not the unsafe kind: _StrictLoader is a SafeLoader.
    return yaml.load(text, Loader=_StrictLoader)  # noqa: S506


class _StrictLoader(yaml.SafeLoader):
    """Refuses what PyYAML takes in silence: keys given twice, and aliases (a bomb's fuse)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML has none
            line = event.start_mark.line + 1
            raise InputError(f"line {line}: aliases are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise InputError(f"line {line}: a key must be a word")
            if key_node.value in seen:
                twice = f"{key_node.value!r:.80}"
                raise InputError(f"line {line}: {twice} is given twice; remove one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)
