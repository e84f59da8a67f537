"""YAML of a stranger: plain values only, and nothing that PyYAML takes in silence."""

from typing import Any

import yaml

from lightning_modules.errors import InputError

# PyYAML builds some 100,000 nodes a second, in Python.
MAX_YAML_BYTES = 1 << 18


def load_yaml(text: str) -> Any:
    """Return what a YAML text says.

    Raises:
        InputError: If a key is given twice, or there is an alias, a tag, or a number in base 60; it
            begins with the line.
        ValueError: If it is no YAML, or too long.
        RecursionError: If it is nested too deeply.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has more than {MAX_YAML_BYTES} characters")
    try:
        # Not the unsafe kind: _StrictLoader is a SafeLoader.
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


class _StrictLoader(yaml.SafeLoader):
    """Refuses what PyYAML takes in silence, and what it fails on with errors of any kind.

    Keys given twice; aliases (a bomb's fuse); tags, whose constructors trust their text; numbers in
    base 60, which take time with the square of their length.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML has none
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"line {line}: aliases are not supported; write the value out")
        if getattr(event, "tag", None) is not None:
            shown = f"{event.tag!r:.80}"
            raise InputError(f"line {line}: tags are not supported; got {shown}: leave it out")
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

    def construct_plain_number(self, node: yaml.ScalarNode) -> int | float:
        """Return what a number is that has no colons."""
        if ":" in node.value:
            line, shown = node.start_mark.line + 1, f"{node.value!r:.80}"
            raise InputError(f"line {line}: {shown} is a number in base 60 to YAML; quote it")
        is_float = node.tag.endswith(":float")
        construct = self.construct_yaml_float if is_float else self.construct_yaml_int
        found: int | float = construct(node)
        return found


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(
        f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_plain_number
    )
