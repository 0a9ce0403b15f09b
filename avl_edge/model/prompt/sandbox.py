"""Where chat templates run: jinja2's sandbox, in which the work and the memory of a template are bounded too.

jinja2's own sandbox says what a template may reach, not what that costs: ``{% set x = 'a' * 500000000 %}`` is one
expression. Here every step is paid for from a budget. A loop's round and a macro's call cost what stands in their
bodies, an operation what its operands hold, however deeply. What is offered takes time and memory in proportion to
its operands, or pays for its result before making it; the rest of jinja2's filters and of the methods of Python's types
(``center``, ``zfill`` and their like, of which a number makes a size) is not offered.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

from jinja2 import Environment, Template, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_join
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_eval_context
from jinja2.visitor import NodeTransformer

BUDGET = 1 << 18
"""Steps of a template itself, about a microsecond each. A published one takes some thousand."""
SOURCE_LENGTH = 1 << 16
"""Characters of a template's source: the longest published ones have 20 thousand."""
_CHARACTERS = 8
"""So many characters of a string cost one step."""
_MOST_PRECISION = 64
_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format"),
    *("groupby", "indent", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject"),
    *("rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "trim"),
    *("truncate", "unique", "upper", "wordcount"),
)
_METHODS = frozenset(
    (
        *("capitalize", "casefold", "copy", "count", "endswith", "find", "get", "index", "isalnum", "isalpha"),
        *("isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "items", "join", "keys"),
        *("lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition"),
        *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "values"),
    )
)
# Widths of three digits and more, and those that are arguments.
_WIDE = re.compile(r"%[^a-zA-Z%]*([0-9]{3}|\*)|\{[^{}]*([0-9]{3}|\{)")


class _Budget(threading.local):
    left = 0


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. Threads may render at the same time, each on its own budget."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, filters: Mapping[str, Callable[..., Any]], functions: Mapping[str, Callable[..., Any]]) -> None:
        """With ``filters`` and ``functions`` beside those of jinja2."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=self.paid,
            optimized=False,
        )
        self._budget = _Budget()
        offered: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in _FILTERS}
        offered |= {"_concat": _concat, **filters}
        self.filters = {name: self._priced(name, each) for name, each in offered.items()}
        self.filters |= {"join": self._join, "_paid": self.paid, "_spend": self.spend}
        asked = cast("Mapping[str, Callable[..., Any]]", self.tests)
        self.tests = {name: self._priced(name, each, of_values=False) for name, each in asked.items()}
        del self.globals["lipsum"]
        self.globals.update(functions)

    def compiled(self, source: str) -> Template:
        """The template of a source. Raises what jinja2 raises, SecurityError for one that is too long or too costly."""
        if len(source) > SOURCE_LENGTH:
            raise SecurityError(f"it has {len(source)} characters, more than {SOURCE_LENGTH}")
        self._budget.left = BUDGET
        return self.from_string(_Priced(self).visit(self.parse(source)))

    def render(self, template: Template, variables: Mapping[str, Any], budget: int) -> str:
        """The text of a template in at most ``budget`` steps; SecurityError where it takes more."""
        self._budget.left = budget
        return template.render(variables)

    def spend(self, steps: int) -> bool:
        """Pay for ``steps``; True, so that it may stand in a condition."""
        self._budget.left -= max(steps, 0)
        if self._budget.left < 0:
            raise SecurityError("it takes more steps or more memory than any chat template needs")
        return True

    def paid(self, value: Any) -> Any:
        """``value``, paid for."""
        self.pay(value)
        return value

    def pay(self, *values: Any, of_values: bool = True) -> int:
        """Pay for values with all that they hold, and give the number of steps.

        With ``of_values`` they must be values: a namespace, a macro or a function as an operand may hold, and print,
        without end.
        """
        steps, waiting = 0, list(values)
        while waiting:
            value = waiting.pop()
            cost = 1
            if isinstance(value, str):
                cost += len(value) // _CHARACTERS
            elif isinstance(value, int):
                cost += _digits(value)
            elif isinstance(value, range):
                cost += len(value)
            elif isinstance(value, dict):
                waiting += [*value.keys(), *value.values()]
            elif isinstance(value, _CONTAINERS):
                waiting += cast("Iterable[Any]", value)
            elif of_values and not isinstance(value, _PLAIN):
                raise SecurityError(f"it uses a {type(value).__name__} as a value")
            self.spend(cost)
            steps += cost
        return steps

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation of two values, paid for by its operands, or by its result where that is larger."""
        steps = self.pay(left, right)
        if isinstance(left, int) and isinstance(right, int):
            power = (left.bit_length() * abs(right) // 64) ** 2
            self.spend(power if operator == "**" else _digits(left) * _digits(right))
        elif operator == "*":
            self.spend(steps * max((each for each in (left, right) if isinstance(each, int)), default=0))
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """``obj[argument]``; to look a key up hashes it."""
        self.pay(argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A function, a macro, or a method that is offered, paid for by its arguments. What a macro does with a
        namespace or another macro it pays for itself."""
        __self.pay(*args, *kwargs.values(), of_values=not isinstance(__obj, Macro))
        # jinja2 wraps str.format, which fetches attributes and makes widths of numbers.
        owner = getattr(inspect.unwrap(__obj), "__self__", None)
        if isinstance(owner, (str, int, float, range, *_CONTAINERS, dict)):
            name = __obj.__name__
            if name not in _METHODS:
                raise SecurityError(f"the method {name} of a {type(owner).__name__} is not supported")
            __self.pay(owner)
            if name == "join":
                args = (__self._items(owner, *args),)
            elif name == "replace":
                __self._pay_replacements(owner, *args)
        return super().call(__context, __obj, *args, **kwargs)

    def _priced(self, name: str, function: Callable[..., Any], of_values: bool = True) -> Callable[..., Any]:
        """A filter or test that pays for its operands."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def priced(*args: Any, **kwargs: Any) -> Any:
            operands = args[first:]
            self.pay(*operands, *kwargs.values(), of_values=of_values)
            if name == "replace":
                self._pay_replacements(*operands, *kwargs.values())
            elif name == "indent":
                self._pay_indents(*operands, **kwargs)
            elif name == "format":
                _check_widths(str(operands[0]))
            elif name == "round" and any(isinstance(each, int) and each > _MOST_PRECISION for each in operands[1:]):
                raise SecurityError(f"it rounds to more than {_MOST_PRECISION} digits")
            return function(*args, **kwargs)

        return priced

    def _pay_replacements(self, text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
        self.spend(str(text).count(str(old)) * len(str(new)) // _CHARACTERS)

    def _pay_indents(self, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
        self.spend((str(text).count("\n") + 1) * (width if isinstance(width, int) else len(str(width))) // _CHARACTERS)

    def _items(self, separator: Any, items: Any = ()) -> list[Any]:
        """What is to be joined, paid for with its separators."""
        listed = list(items)
        self.pay(*listed)
        self.spend(len(listed) * len(str(separator)) // _CHARACTERS)
        return listed

    @pass_eval_context
    def _join(__self, __context: EvalContext, value: Any, d: Any = "", attribute: Any = None) -> str:
        __self.pay(value, d, attribute)
        joined: str = do_join(__context, __self._items(d, value), d, attribute)
        return joined


_CONTAINERS: tuple[type, ...] = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
_PLAIN = (float, type(None), Undefined, Iterator)


@pass_eval_context
def _concat(context: EvalContext, values: tuple[Any, ...]) -> str:
    """The operator ``~``."""
    return (markup_join if context.autoescape else str_join)(values)


def _digits(number: int) -> int:
    """In machine words."""
    return number.bit_length() // 64


def _check_widths(form: str) -> None:
    if _WIDE.search(form):
        raise SecurityError("it pads to a width of three digits or more")


class _Priced(NodeTransformer):
    """Rewrites a template's syntax tree, so that what no method of the sandbox sees is paid for as well."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._weight = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Counts what it visits: each node, and the text that stands in the template."""
        self._weight += 1 + (len(node.data) // _CHARACTERS if isinstance(node, nodes.TemplateData) else 0)
        return super().visit(node, *args, **kwargs)

    def _visit_body(self, node: Any) -> nodes.Node:
        before = self._weight
        self.generic_visit(node)
        spend = self._filtered(nodes.Const(self._weight - before, lineno=node.lineno), "_spend")
        node.body.insert(0, nodes.ExprStmt(spend, lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    visit_Template = visit_Macro = visit_CallBlock = visit_Block = _visit_body

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._visit_body(node)
        if node.test is not None:  # what it leaves out is a round too
            spend = self._filtered(nodes.Const(1, lineno=node.lineno), "_spend")
            node.test = nodes.And(spend, node.test, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno), "_concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._filtered(node.expr, "_paid")
        for operand in node.ops:
            operand.expr = self._filtered(operand.expr, "_paid")
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered(node, "_paid")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered(node, "_paid") if isinstance(node.arg, nodes.Slice) else node

    def _filtered(self, node: nodes.Expr, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self._environment)


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's text for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
