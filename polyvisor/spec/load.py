"""Spec files: YAML (and so JSON), one VM a document, read without trust.

A file may come from anywhere: its size is bounded, and YAML aliases (with which a few lines grow to gigabytes) and
duplicate keys (of which YAML would silently keep the last) are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from polyvisor.errors import InvalidInput, NotFound
from polyvisor.files import storage_errors
from polyvisor.spec.parse import structure
from polyvisor.spec.vm import VMSpec

MAX_FILE = 1 << 20
MAX_DEPTH = 20


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases, duplicate keys and absurd nesting."""

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

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise _at(key_node.start_mark, f"the key '{key_node.value}' stands twice")
            if isinstance(key_node.value, str):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _mark(loader: _StrictLoader) -> Any:
    return loader.peek_event().start_mark  # type: ignore[no-untyped-call]


def _at(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def load_specs(text: str, source: str) -> list[VMSpec]:
    """The specs in YAML `text`; `source` names it in errors. Raises InvalidInput."""
    if len(text) > MAX_FILE:
        raise InvalidInput(
            "file", source, "is larger than 1 MiB", hint="a spec is a few hundred bytes; is this the right file?"
        )
    try:
        documents = [document for document in yaml.load_all(text, _StrictLoader) if document is not None]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidInput("file", source, f"is not valid YAML: {_yaml_problem(error)}") from error
    if not documents:
        raise InvalidInput("file", source, "holds no spec", hint="begin with 'name:' and 'image:'")
    return [structure(_with_key_files(document), VMSpec) for document in documents]


def read_specs(path: Path) -> list[VMSpec]:
    """The specs in the YAML file at `path`; raises InvalidInput, NotFound, NotPermitted."""
    if not path.exists():
        raise NotFound(f"there is no file {path}")
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        raw = file.read(MAX_FILE + 1)
    try:
        return load_specs(raw.decode(), str(path))
    except UnicodeDecodeError as error:
        raise InvalidInput("file", str(path), "is not text in UTF-8") from error


def read_ssh_key(text: str, field: str = "ssh_keys") -> str:
    """The public key `text` itself, or the one in the file that `text` names; raises InvalidInput."""
    if text.startswith(("ssh-", "ecdsa-", "sk-")):
        return text.strip()
    path = Path(text).expanduser()
    try:
        with path.open("rb") as file:
            content = file.read(16 << 10).decode().strip()
    except (OSError, UnicodeDecodeError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "is not text"
        raise InvalidInput(
            field, text, f"can't be read: {problem}", hint="give a public key or a file ending in .pub"
        ) from error
    if "PRIVATE KEY" in content:
        raise InvalidInput(field, text, "is a private key", hint=f"use {text}.pub")
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
