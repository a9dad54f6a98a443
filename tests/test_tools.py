"""Law: a tool answers whatever a model writes with text; arithmetic is Python's, within limits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import UserError
from train.tools import CALCULATOR, PYTHON, TOOLS, Tool, calculate, call_tool, tools_named

ALL = list(TOOLS.values())


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("313 - 656", "-343"),
        ("374*21", "7854"),
        ("7 / 2", "3.5"),
        ("6 / 3", "2"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2 ** 10", "1024"),
        ("2^-1", "0.5"),
        ("(1 + 2) × 3 ÷ 9 − 1", "0"),
        ("-(2 + 3)", "-5"),
        ("sqrt(16) + abs(-3)", "7.0"),
        ("max(1, 2, 3) * round(2.6)", "9"),
        ("cos(pi)", "-1.0"),
        ("factorial(5)", "120"),
        ("2**100", "1267650600228229401496703205376"),
    ],
)
def test_arithmetic_by_hand(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "1 / 0",
        "9 ** 9 ** 9",
        "2 ** 100000",
        "(-8) ** 0.5",
        "1e308 * 10",
        "__import__('os').system('true')",
        "[1] * 9",
        "'a' * 9",
        "(lambda: 1)()",
        "True + 1",
        "1 if 2 else 3",
        "sqrt(-1)",
        "factorial(100000)",
        "sqrt()",
        "min(1)",
        "round(1, ndigits=2)",
        "x + 1",
        "",
        "(" * 300 + ")" * 300,
        "round(5, -10**9)",
        "1+" * 5000 + "1",
        "\x00",
    ],
)
def test_everything_else_is_an_error_in_words(expression: str) -> None:
    assert calculate(expression).startswith("error: ")


@given(st.text(alphabet="0123456789+-*/%(). e\n", max_size=40) | st.text())
def test_no_expression_raises(expression: str) -> None:
    assert isinstance(calculate(expression), str)


@given(st.integers(-(10**20), 10**20), st.integers(-(10**20), 10**20), st.sampled_from(["+", "-", "*"]))
def test_integers_are_exact(a: int, b: int, sign: str) -> None:
    assert calculate(f"({a}) {sign} ({b})") == str({"+": a + b, "-": a - b, "*": a * b}[sign])


def test_a_program_answers_with_what_it_prints_or_the_last_line_of_its_error() -> None:
    def run(code: str) -> str:
        return call_tool(ALL, "python", json.dumps({"code": code}))

    assert run("print(6 * 7)") == "42\n"
    assert run("x = 1") == "(the program printed nothing)"
    assert run("print('so far')\n{}['key']") == "so far\nerror: KeyError: 'key'"
    assert run("import os; os.abort()") == "error: the program crashed"


@pytest.mark.parametrize(
    ("name", "arguments", "answer"),
    [
        ("calculator", '{"expression": "1+1"}', "2"),
        ("calculater", "{}", "error: there is no tool 'calculater'; there is calculator, python"),
        ("calculator", "{", "error: the arguments are not JSON"),
        ("calculator", "[]", "error: the arguments are no JSON object"),
        ("calculator", "{}", "error: argument 'expression' is missing"),
        ("calculator", '{"expression": 3}', "error: argument 'expression' is to be of type string"),
        ("calculator", '{"expresion": "3"}', "error: unknown argument 'expresion'; did you mean 'expression'?"),
    ],
)
def test_calls(name: str, arguments: str, answer: str) -> None:
    assert call_tool(ALL, name, arguments).startswith(answer)


@given(st.sampled_from(["calculator", "nobody"]), st.text())
def test_no_call_raises(name: str, arguments: str) -> None:
    assert isinstance(call_tool(ALL, name, arguments), str)


def test_a_tool_that_raises_answers_with_its_error() -> None:
    def fail(_: dict[str, object]) -> str:
        raise RuntimeError("it broke")

    assert call_tool([Tool("t", "", {}, fail)], "t", "{}") == "error: RuntimeError: it broke"


def test_tools_describe_themselves_as_openai_has_it() -> None:
    assert CALCULATOR.schema["type"] == "function"
    assert PYTHON.schema["function"]["parameters"]["required"] == ["code"]
    with pytest.raises(UserError, match="did you mean 'python'"):
        tools_named(["pyton"])
    assert tools_named(["python"]) == [PYTHON]
