"""What functions and classes take, read from their source: nothing is imported, as torch and Lightning take seconds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from docstring_parser import parse

from pi05_lightning.files.shipped import PACKAGE

Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Module:
    """A module's source."""

    name: str
    tree: ast.Module

    def statements(self) -> Iterator[ast.stmt]:
        """What stands at its top, in `if` and `try` too."""
        waiting = list[Any](self.tree.body)
        while waiting:
            statement = waiting.pop(0)
            yield statement
            waiting += [*getattr(statement, "body", ()), *getattr(statement, "orelse", ())] * isinstance(
                statement, ast.If | ast.Try
            )

    def find(self, name: str) -> Found | None:
        """What a name means in the module: what is defined there, or where it is imported from."""
        for statement in self.statements():
            match statement:
                case ast.ClassDef() | ast.FunctionDef() if statement.name == name:
                    return Found(statement, self)
                case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                    return Found(value, self)
                case ast.ImportFrom(module=str(origin), names=names, level=0):
                    for alias in names:
                        if (alias.asname or alias.name) == name:
                            home = module(origin)
                            return home.find(alias.name) if home else None
        return None


@dataclass(frozen=True)
class Found:
    """A definition or an expression, and the module whose names it uses."""

    node: ast.AST
    home: Module

    @property
    def name(self) -> str:
        return getattr(self.node, "name", "")

    @property
    def doc(self) -> str:
        return (ast.get_docstring(self.node) if isinstance(self.node, Definition) else None) or ""

    @property
    def summary(self) -> str:
        """The first sentence of its docstring."""
        return sentence(self.doc)

    def member(self, name: str) -> Found | None:
        for statement in getattr(self.node, "body", ()):
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                return Found(statement, self.home)
        return None

    @property
    def is_dataclass(self) -> bool:
        decorators = getattr(self.node, "decorator_list", ())
        return any(ast.unparse(d).partition("(")[0] == "dataclass" for d in decorators)

    @property
    def is_abstract(self) -> bool:
        return "ABC" in map(ast.unparse, getattr(self.node, "bases", ()))

    @property
    def bases(self) -> list[Found]:
        names = [ast.unparse(base) for base in getattr(self.node, "bases", ())]
        return [found for name in names if (found := self.home.find(name))]


@dataclass(frozen=True)
class Option:
    """An argument. kind: its type. default: as it is written in YAML, None where one has to be given.

    keyword: whether it can only be given by its name.
    """

    name: str
    kind: str
    default: str | None
    text: str
    home: Module
    keyword: bool = False

    def with_default(self, defaults: Mapping[str, Any]) -> Option:
        return replace(self, default=in_yaml(defaults[self.name])) if self.name in defaults else self

    @property
    def shown_default(self) -> str:
        return "required" if self.default is None else self.default

    @property
    def full(self) -> str:
        """All that is to be known."""
        facts = [self.kind.replace("None", "null")]
        if self.default != "":
            facts.append("required" if self.default is None else f"default: {self.default}")
        return f"{self.text} ({', '.join(facts)})".strip()

    def inside(self, key: str) -> str:
        """Where the options of what it holds stand, which itself has the key."""
        if self.kind.startswith(("list", "Sequence")):
            return f"{key}[0]"
        return f"{key}.NAME" if self.kind.startswith("dict") else key

    @property
    def types(self) -> list[Found]:
        """The classes that its type names."""
        names = {node.id for node in ast.walk(ast.parse(self.kind)) if isinstance(node, ast.Name)}
        found = [self.home.find(name) for name in sorted(names)]
        return [kind for kind in found if kind and isinstance(kind.node, ast.ClassDef)]


@cache
def module(name: str) -> Module | None:
    """The source of a module or package; None where there is none in Python."""
    top, *inner = name.split(".")
    spec = find_spec(top)  # of a top-level package this imports nothing
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], *inner)
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return Module(name, ast.parse(file.read_text(encoding="utf-8")))
    return None


def find(path: str) -> Found:
    """A function, a class or a classmethod by its import path."""
    home, _, name = path.rpartition(".")
    source = module(home)
    found = source.find(name) if source else find(home).member(name)
    assert found is not None, path
    return found


def subclasses(base: Found) -> list[Found]:
    """The classes of this package that are made for a base class, those beside it left out.

    What is made for an abstract class beside it, which is made for it too, counts.
    """
    beside = [Found(s, base.home) for s in base.home.statements() if isinstance(s, ast.ClassDef)]
    bases = [base, *(kind for kind in beside if kind.is_abstract and any(of.node is base.node for of in kind.bases))]
    found = list[Found]()
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if any(of.name in text for of in bases):
            source = module(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
            if source is None or source is base.home:
                continue
            kinds = [Found(s, source) for s in source.statements() if isinstance(s, ast.ClassDef)]
            found += [kind for kind in kinds if any(one.node is of.node for one in kind.bases for of in bases)]
    return found


def options_of(found: Found) -> list[Option]:
    """The arguments of a function, a class, or a dataclass, in their order, with what their docstrings say."""
    node = found.node
    if isinstance(node, ast.FunctionDef):
        return arguments(node, found.home, ast.get_docstring(node) or "")
    assert isinstance(node, ast.ClassDef)
    own = fields(node, found.home) if found.is_dataclass else []
    if init := found.member("__init__"):
        assert isinstance(init.node, ast.FunctionDef)
        docs = (ast.get_docstring(part) or "" for part in (node, init.node))
        own = arguments(init.node, found.home, *docs)
        if not re.search(r"super\(\)\.__init__\([^()]*\*\*", ast.unparse(init.node)):
            return own
    inherited = [option for base in found.bases for option in options_of(base)]
    return list({option.name: option for option in (*inherited, *own)}.values())


def arguments(function: ast.FunctionDef, home: Module, *docs: str) -> list[Option]:
    texts = {p.arg_name: plain(p.description or "") for doc in docs for p in parse(doc).params}
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    defaults = [*missing, *given.defaults, *given.kw_defaults]
    options = [
        Option(
            arg.arg, kind_of(arg.annotation), written(default, home) if default else None, texts.get(arg.arg, ""), home
        )
        for arg, default in zip((*positional, *given.kwonlyargs), defaults, strict=True)
        if arg.arg not in ("self", "cls")
    ]
    options = [replace(o, keyword=o.name in {arg.arg for arg in given.kwonlyargs}) for o in options]
    return options + (forwarded(function, home, given.kwarg.arg) if given.kwarg else [])


def forwarded(function: ast.FunctionDef, home: Module, rest: str) -> list[Option]:
    """The arguments that a function passes on as `**rest`, those that it gives itself left out."""
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        if any(word.arg is None and ast.unparse(word.value) == rest for word in call.keywords):
            name, _, method = ast.unparse(call.func).partition(".")
            callee = home.find(name)
            callee = callee.member(method) if callee and method else callee
            own = {word.arg for word in call.keywords}
            return [option for option in options_of(callee) if option.name not in own] if callee else []
    return []


def fields(node: ast.ClassDef, home: Module) -> list[Option]:
    options = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or "ClassVar" in ast.unparse(statement.annotation):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = plain(str(following.value.value))
        default = written(statement.value, home) if statement.value else None
        options.append(Option(ast.unparse(statement.target), kind_of(statement.annotation), default, text, home))
    return options


def kind_of(annotation: ast.expr | None) -> str:
    match annotation:
        case None:
            return "Any"
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return f"{kind_of(inner)} | None"
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=kinds)):
            return " | ".join(map(kind_of, kinds))
        case _:
            return ast.unparse(annotation)


def written(default: ast.expr, home: Module) -> str:
    """A default as YAML has it; what a name stands for; nothing for an object, whose own options say it."""
    match default:
        case ast.Call(func=ast.Name(id="field"), keywords=keywords):
            made = {word.arg: word.value for word in keywords}
            factory = made.get("default_factory")
            kinds: dict[str, str] = {"dict": "{}", "list": "[]"}
            return kinds.get(ast.unparse(factory), "") if factory else written(made["default"], home)
        case ast.Call(func=ast.Name(id="Path"), args=[path]):
            return written(path, home)
        case ast.Name(id=name):
            found = home.find(name)
            if found and isinstance(found.node, ast.FunctionDef):
                return ast.unparse(found.node.body[-1]).removeprefix("return ")
            return written(found.node, found.home) if found and isinstance(found.node, ast.expr) else name
        case ast.Call():
            return ""
        case _:
            return in_yaml(ast.literal_eval(default))


def in_yaml(value: Any) -> str:
    """A plain value as YAML has it."""
    if isinstance(value, bool | None):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_yaml, value))}]"
    return str(value)


def plain(text: str) -> str:
    """A docstring's text in one line, without Sphinx's marks and the default, which the signature says."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text.replace("``", "`"))
    return " ".join(re.sub(r"Default: [^.]*(\.\d+[^.]*)?\.\s*$", "", text).split())


def sentence(text: str) -> str:
    """The first sentence of a text, in one line."""
    return re.split(r"\. (?=[A-Z`])", " ".join(text.partition("\n\n")[0].split()))[0].rstrip(".")
