"""Tools that a model may call while it answers: a calculator, and Python in the sandbox.

Nothing here raises for what a model writes: an error is text, which the model reads as the tool's answer.
"""

from __future__ import annotations

import ast
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from errors import UserError, did_you_mean
from train.sandbox import check_sandbox, last_line, run_python

LONGEST_EXPRESSION = 1000
"""Characters."""
LARGEST_BITS = 4096
"""Of an integer on the way; about 1,200 decimal digits."""
ANSWER_CHARACTERS = 8192
"""Of what a program printed."""

Number = int | float


@dataclass(frozen=True)
class Tool:
    """Something that a model may call.

    Attributes:
        name: as the model writes it. description: for the model. parameters: JSON Schema of the arguments, an object.
        call: from checked arguments to the answer's text. May raise: `call_tool` makes text of it.
    """

    name: str
    description: str
    parameters: Mapping[str, Any] = field(repr=False)
    call: Callable[[dict[str, Any]], str] = field(repr=False)

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as `tools` of a request have it (OpenAI's form)."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def call_tool(tools: Sequence[Tool], name: str, arguments_json: str) -> str:
    """The answer of the tool called `name`; an error as text where there is none, or arguments are not as it asks."""
    try:
        tool = next((tool for tool in tools if tool.name == name), None)
        if tool is None:
            return f"error: there is no tool {name!r}; there is {', '.join(tool.name for tool in tools) or 'none'}"
        try:
            arguments = json.loads(arguments_json)
        except ValueError as error:
            return f"error: the arguments are not JSON: {error}"
        problem = mistake(tool.parameters, arguments)
        return f"error: {problem}" if problem else tool.call(arguments)
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"


def mistake(schema: Mapping[str, Any], arguments: Any) -> str:
    """What is wrong with arguments under an object's schema (names, types of the first level); empty if nothing is."""
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
    if not isinstance(arguments, dict):
        return "the arguments are no JSON object"
    properties = schema.get("properties", {})
    for name, value in arguments.items():
        if name not in properties:
            return f"unknown argument {name!r}{did_you_mean(name, properties)}"
        kind = properties[name].get("type")
        if kind in kinds and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean")):
            return f"argument {name!r} is to be of type {kind}"
    missing = [name for name in schema.get("required", ()) if name not in arguments]
    return f"argument {missing[0]!r} is missing" if missing else ""


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, or `error: ...`.

    Numbers, + - * / // % **, parentheses, `pi`, `e` and the functions of `FUNCTIONS`. Integers are exact. Never raises.
    """
    if len(expression) > LONGEST_EXPRESSION:
        return f"error: the expression is longer than {LONGEST_EXPRESSION} characters"
    text = expression.strip().replace("^", "**").replace("×", "*").replace("÷", "/").replace("−", "-")
    try:
        value = evaluate(ast.parse(text, mode="eval").body)
        if isinstance(value, float) and not math.isfinite(value):
            return "error: the result is not finite"
        return str(value)
    except ZeroDivisionError:
        return "error: division by zero"
    except SyntaxError:
        return "error: this is no arithmetic expression"
    except (ValueError, OverflowError, TypeError, ArithmeticError) as error:
        return f"error: {error}"
    except (RecursionError, MemoryError):
        return "error: the expression is nested too deeply"


def evaluate(node: ast.expr) -> Number:
    """The value of a parsed expression. ValueError: this is no arithmetic; ArithmeticError as Python has it."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: Number = node.value  # type: ignore[assignment]
    elif isinstance(node, ast.Name) and node.id in CONSTANTS:
        value = CONSTANTS[node.id]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        operand = evaluate(node.operand)
        value = -operand if isinstance(node.op, ast.USub) else operand
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        value = OPERATIONS[type(node.op)](evaluate(node.left), evaluate(node.right))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in FUNCTIONS:
            raise ValueError(f"unknown function {node.func.id!r}{did_you_mean(node.func.id, FUNCTIONS)}")
        value = FUNCTIONS[node.func.id](*map(evaluate, node.args))
    else:
        raise ValueError("only numbers, + - * / // % **, parentheses and " + ", ".join(FUNCTIONS) + " are understood")
    if isinstance(value, complex):
        raise ValueError("the result is no real number")
    if isinstance(value, int) and value.bit_length() > LARGEST_BITS:
        raise ValueError("the numbers get too large")
    return value


def power(base: Number, exponent: Number) -> Number:
    """base ** exponent, refused before it takes long. Raises ValueError, OverflowError."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > LARGEST_BITS:
        raise ValueError("the numbers get too large")
    return base**exponent


def divide(a: Number, b: Number) -> Number:
    """a / b; exact where both are integers and it goes in."""
    return a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b


def factorial(n: Number) -> int:
    """n!, for an n that keeps it small. Raises ValueError."""
    if not isinstance(n, int) or n > 400:
        raise ValueError("factorial takes an integer up to 400")
    return math.factorial(n)


def rounded(value: Number, digits: Number = 0) -> Number:
    """round(), for few digits: an integer's would be computed by a power of ten. Raises ValueError."""
    if not isinstance(digits, int) or abs(digits) > 400:
        raise ValueError("round takes up to 400 digits")
    return round(value, digits) if digits else round(value)


OPERATIONS: dict[type, Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: power,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": rounded,
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "gcd": math.gcd,
    "lcm": math.lcm,
    "factorial": factorial,
}
CONSTANTS = {"pi": math.pi, "e": math.e}


def run_program(code: str) -> str:
    """What a program prints, or the last line of its error. Raises UserError where the machine has no sandbox."""
    outcome = run_python(code)
    said = outcome.stdout
    if len(said) > ANSWER_CHARACTERS:
        said = said[:ANSWER_CHARACTERS] + "\n(cut)"
    if outcome.ok:
        return said or "(the program printed nothing)"
    reasons = {
        "timeout": "the program took too long",
        "memory": "the program used too much memory",
        "processes": "the program started too many processes",
        "killed": "the program crashed",
    }
    why = reasons.get(outcome.reason) or last_line(outcome.stderr) or "the program failed"
    return f"{said.rstrip()}\nerror: {why}".lstrip()


def _argument(name: str, explanation: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": explanation}},
        "required": [name],
    }


CALCULATOR = Tool(
    "calculator",
    "Computes an arithmetic expression.",
    _argument("expression", "numbers, + - * / // % **, parentheses and " + ", ".join(FUNCTIONS)),
    lambda arguments: calculate(arguments["expression"]),
)
PYTHON = Tool(
    "python",
    "Runs a Python program with the standard library and returns what it prints.",
    _argument("code", "the whole program; what it prints is the answer"),
    lambda arguments: run_program(arguments["code"]),
)
TOOLS = {tool.name: tool for tool in (CALCULATOR, PYTHON)}


def tools_named(names: Sequence[str]) -> list[Tool]:
    """The built-in tools of these names. Raises UserError for one that is none, or needs a sandbox where none is."""
    for name in names:
        if name not in TOOLS:
            raise UserError(f"there is no tool {name!r}{did_you_mean(name, TOOLS)}; there is {', '.join(TOOLS)}")
    if PYTHON.name in names:
        check_sandbox()
    return [TOOLS[name] for name in names]
