"""Spec files: YAML (and so JSON), one VM a document, read without trust.

A file may come from anywhere: its size is bounded, and YAML aliases (with which a few lines grow to gigabytes) and
duplicate keys (of which YAML would silently keep the last) are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from polyvisor.errors import InvalidInput, NotFound, PolyvisorError, shortened
from polyvisor.files import storage_errors
from polyvisor.spec.parse import structure
from polyvisor.spec.vm import VMSpec

MAX_FILE = 1 << 20
MAX_DEPTH = 20
_KEY_TYPES = ("ssh-", "ecdsa-", "sk-")


_TEXT = "tag:yaml.org,2002:str"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases, duplicate keys and absurd nesting.

    Without quotes 2222:22 and 52:54:00:12:34:56 are text, as in YAML 1.2; YAML 1.1 took them for numbers to the base of 60.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _at(_mark(self), "aliases (*name) are not allowed")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _at(_mark(self), f"nesting is deeper than {MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: type[yaml.Node], value: str, implicit: Any) -> str:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return _TEXT if tag in _NUMBERS and ":" in value else tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node.value, str):
                raise _at(key_node.start_mark, "a key is not text")
            if key_node.value in seen:
                raise _at(key_node.start_mark, f"the key {shortened(key_node.value)} stands twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _mark(loader: _StrictLoader) -> Any:
    return loader.peek_event().start_mark  # type: ignore[no-untyped-call]


def _at(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def load_specs(text: str | bytes, source: str) -> list[VMSpec]:
    """The specs in YAML `text` (bytes are UTF-8); `source` names it in errors. Raises InvalidInput."""
    if len(text) > MAX_FILE:
        raise InvalidInput(
            "file", source, "is larger than 1 MiB", hint="a spec is a few hundred bytes; is this the right file?"
        )
    try:
        text = text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput("file", source, "is not text in UTF-8", hint="is this the right file?") from error
    try:
        documents = [document for document in yaml.load_all(text, _StrictLoader) if document is not None]
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # The constructors of tags such as !!int and !!bool raise whatever a text of another form leads them to.
        raise InvalidInput("file", source, f"is not valid YAML: {_yaml_problem(error)}") from error
    if not documents:
        raise InvalidInput("file", source, "holds no spec", hint="begin with 'name:' and 'image:'")
    return [structure(_with_key_files(document), VMSpec) for document in documents]


def read_specs(path: Path) -> list[VMSpec]:
    """The specs in the YAML file at `path`; raises InvalidInput, NotFound, NotPermitted."""
    try:
        with storage_errors(f"reading {path}"), path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
    except PolyvisorError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise NotFound(f"there is no file {path}") from error
        raise
    return load_specs(raw, str(path))


def read_ssh_key(text: str, field: str = "ssh_keys") -> str:
    """The public key `text` itself, or the one in the file that `text` names; raises InvalidInput."""
    if text.startswith(_KEY_TYPES):
        return text.strip()
    try:
        with Path(text).expanduser().open("rb") as file:
            content = file.read(16 << 10).decode().strip()
    except (OSError, RuntimeError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise InvalidInput(
            field, text, f"can't be read: {problem}", hint="give a public key or a file ending in .pub"
        ) from error
    if "PRIVATE KEY" in content:
        raise InvalidInput(field, text, "is a private key", hint=f"use {text}.pub")
    if not content.startswith(_KEY_TYPES):
        raise InvalidInput(field, text, "holds no public SSH key", hint="give a file ending in .pub")
    return content


def _with_key_files(document: Any) -> Any:
    """`document` with the files that its ssh_keys name replaced by what they hold."""
    if not isinstance(document, dict) or not isinstance(document.get("ssh_keys"), list):
        return document
    keys = [read_ssh_key(k, f"ssh_keys[{i}]") if isinstance(k, str) else k for i, k in enumerate(document["ssh_keys"])]
    return {**document, "ssh_keys": keys}


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    return "it nests too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
