"""Reads YAML safely into plain dictionaries, and remembers on which line each key stands.

Differences from plain PyYAML: `1e-4` is a number (YAML 1.2), dates stay text, a key written twice is an error, and so is a file
whose aliases stand for more than `MAX_VALUES` values.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from neobert.errors import ConfigError, Problem

MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class Layer(NamedTuple):
    """Nested values as one file sets them, where each key and section is written (`file:line`), and what is wrong with them."""

    values: dict[str, Any]
    origins: dict[str, str]
    problems: list[Problem]


def parse_scalar(text: str) -> Any:
    """The value that YAML reads in `text`, as on the command line: `3`, `true`, `[a, b]`, `null`, text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text


def read_yaml(path: str | Path) -> Layer:
    """Read one mapping from a file. Raises ConfigError naming file and line for anything that is not one."""
    layer = Layer({}, {}, [])
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
        if node is None:
            return layer
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(Problem("", f"{path}: expected sections such as `trainer:`, found a single value"))
        _count_values(node, {})
        _record_lines(node, "", layer, path)
        layer.values.update(_Loader("").construct_document(node))
        return layer
    except ConfigError:
        raise
    except FileNotFoundError:
        problem = ": no such file"
    except OSError as error:
        problem = f": cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        problem = f": not UTF-8 text (byte {error.start})"
    except yaml.YAMLError as error:
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = f"{line}: not valid YAML: {reason or str(error).splitlines()[0]}"
    except (RecursionError, ValueError, TypeError) as error:
        problem = f": not a usable YAML document: {error}"
    raise ConfigError(Problem("", f"{path}{problem}"))


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """The values below a node once its aliases are written out; `known` holds the counts so far, 0 of nodes not yet finished.

    Raises ConstructorError for an alias that contains itself, and for too many values.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if known.get(id(node)) == 0:
        raise yaml.constructor.ConstructorError(None, None, "an alias contains itself", node.start_mark)
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = 0
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    count = 1 + sum(_count_values(one, known) for one in inner)
    if count > MAX_VALUES:
        problem = f"its aliases stand for more than {MAX_VALUES:,} values; write out what is needed"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    known[id(node)] = count
    return count


def _record_lines(node: yaml.MappingNode, prefix: str, layer: Layer, path: str | Path) -> None:
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            raise ConfigError(Problem(prefix.rstrip("."), "keys must be words", where))
        dotted = prefix + key_node.value
        if first := layer.origins.get(dotted):
            message = f"written twice, first on line {first.rpartition(':')[2]}"
            layer.problems.append(Problem(dotted, message, where))
        layer.origins[dotted] = where
        if isinstance(value_node, yaml.MappingNode):
            _record_lines(value_node, dotted + ".", layer, path)
