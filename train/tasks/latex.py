"""Values of expressions in LaTeX or plain notation, by a small parser of our own: nothing of a reply is executed.

Two expressions are held to be the same function when they agree at several points: exactly where all is rational, else
to 1e-9 of their size. Polynomials of degree d that differ agree at a random point of n with a chance of at most d/n
(Schwartz 1980; Zippel 1979), which is why no algebra is needed, and nothing can take long.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable
from fractions import Fraction

from train.tasks.task import share

Value = Fraction | complex
POINTS = 4
TOLERANCE = 1e-9
MOST_TOKENS, DEEPEST, MOST_BITS = 400, 40, 4096
TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\[A-Za-z]+|\\[{}|]|[A-Za-z]|\S")
CONSTANTS: dict[str, Value] = {"\\pi": complex(math.pi), "i": 1j, "e": complex(math.e)}
FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "\\sin": cmath.sin,
    "\\cos": cmath.cos,
    "\\tan": cmath.tan,
    "\\cot": lambda x: 1 / cmath.tan(x),
    "\\sec": lambda x: 1 / cmath.cos(x),
    "\\csc": lambda x: 1 / cmath.sin(x),
    "\\arcsin": cmath.asin,
    "\\arccos": cmath.acos,
    "\\arctan": cmath.atan,
    "\\sinh": cmath.sinh,
    "\\cosh": cmath.cosh,
    "\\tanh": cmath.tanh,
    "\\exp": cmath.exp,
    "\\ln": cmath.log,
    "\\log": cmath.log10,
}
FRACTIONS, TIMES, ENDS = ("\\frac", "\\dfrac", "\\tfrac", "\\cfrac"), ("*", "\\cdot", "\\times"), ("+", "-", "=", ",")
PLAIN_WORDS = re.compile(r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln|exp)(?![A-Za-z])")


class NotAnExpressionError(ValueError):
    """A text that is no expression as far as the parser knows."""


def value_at(text: str, point: int) -> Value:
    """The value of an expression where each variable has a positive value that depends on its name and `point`.

    Raises NotAnExpressionError; ArithmeticError where it has none there.
    """
    plain = PLAIN_WORDS.sub(r"\\\1 ", text.replace("**", "^").replace("√", "\\sqrt ").replace("π", "\\pi "))
    tokens = TOKEN.findall(plain.replace("−", "-").replace("·", "*").replace("×", "*").replace("÷", "/"))
    if not tokens or len(tokens) > MOST_TOKENS:
        raise NotAnExpressionError("empty or too long")
    parser = Parser(tokens, point)
    value = parser.sum()
    if parser.at < len(tokens):
        raise NotAnExpressionError(f"{tokens[parser.at]!r} is not understood")
    return value


def same_value(a: str, b: str) -> bool:
    """Whether two expressions agree wherever both have a value; False where either is none."""
    agreed = 0
    for point in range(POINTS):
        try:
            x, y = value_at(a, point), value_at(b, point)
        except ArithmeticError:
            continue
        except (NotAnExpressionError, ValueError):
            return False
        if not close(x, y):
            return False
        agreed += 1
    return agreed > 0


def close(x: Value, y: Value) -> bool:
    """Equal if both are rational, else within rounding."""
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    try:
        a, b = complex(x), complex(y)
    except OverflowError:
        return False
    if not (cmath.isfinite(a) and cmath.isfinite(b)):
        return False
    return abs(a - b) <= TOLERANCE * max(1e-3, abs(a), abs(b))


def variable(name: str, point: int) -> Fraction:
    """A value from 1 to 3 with a denominator of about ten thousand: degrees stay small beside it."""
    return 1 + Fraction(int(share(f"{name} {point}") * 20014), 10007)


class Parser:
    """Recursive descent over tokens; each method returns a value and leaves `at` behind what it read."""

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens, self.point, self.at, self.depth = tokens, point, 0, 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        if self.at >= len(self.tokens):
            raise NotAnExpressionError("it stops too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, token: str) -> None:
        if self.next() != token:
            raise NotAnExpressionError(f"{token!r} is missing")

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotAnExpressionError("nested too deeply")
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = self.next()
            other = self.product()
            value = small(value + other if sign == "+" else value - other)
        self.depth -= 1
        return value

    def product(self) -> Value:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.next() == "-" else sign
        value = self.power()
        while True:
            token = self.peek()
            if token in TIMES:
                self.next()
                value = small(value * self.signed_power())
            elif token in ("/", "\\div"):
                self.next()
                value = small(value / self.signed_power())
            elif token and token not in ENDS and token not in (")", "]", "}", "|", "\\}", "\\|"):
                value = small(value * self.power())
            else:
                return sign * value

    def signed_power(self) -> Value:
        if self.peek() == "-":
            self.next()
            return -self.power()
        return self.power()

    def power(self) -> Value:
        value = self.atom()
        while self.peek() == "!":
            self.next()
            value = factorial(value)
        if self.peek() == "^":
            self.next()
            return raise_to(value, self.argument())
        return value

    def argument(self) -> Value:
        """What follows ^ or a command: a group, a digit, or one atom."""
        if self.peek() == "-":
            self.next()
            return -self.argument()
        token = self.peek()
        if re.fullmatch(r"\d\d+", token) and self.at and self.tokens[self.at - 1] in FRACTIONS:  # \frac34
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self.atom()

    def group(self, end: str) -> Value:
        value = self.sum()
        self.expect(end)
        return value

    def atom(self) -> Value:
        token = self.next()
        if token[0].isdigit() or token[0] == ".":
            return self.number(token)
        if token in ("(", "[", "{", "\\{", "|"):
            value = self.group({"(": ")", "[": "]", "{": "}", "\\{": "\\}", "|": "|"}[token])
            return magnitude(value) if token == "|" else value
        if token in FRACTIONS:
            above = self.argument()
            if len(self.peek()) > 1 and self.peek().isdigit() and self.tokens[self.at - 1] != "}":
                digit, rest = self.peek()[0], self.peek()[1:]  # \frac1234 is 1/2 times 34
                self.tokens[self.at : self.at + 1] = [digit, rest]
            return small(above / self.argument())
        if token == "\\sqrt":
            order: Value = Fraction(2)
            if self.peek() == "[":
                self.next()
                order = self.group("]")
            return raise_to(self.argument(), 1 / order)
        if token in FUNCTIONS:
            return self.function(token)
        if token in CONSTANTS:
            return CONSTANTS[token]
        if re.fullmatch(r"[A-Za-z]|\\[a-z]{2,7}", token) and token not in (
            "\\text",
            "\\infty",
            "\\cup",
            "\\pm",
            "\\in",
        ):
            return variable(self.subscripted(token), self.point)
        raise NotAnExpressionError(f"{token!r} is not understood")

    def subscripted(self, name: str) -> str:
        if self.peek() != "_":
            return name
        self.next()
        token = self.next()
        if token == "{":
            start = self.at
            while self.next() != "}":
                pass
            token = "".join(self.tokens[start : self.at - 1])
        return f"{name}_{token}"

    def number(self, token: str) -> Value:
        if len(token) > 1000:
            raise NotAnExpressionError("a number is too long")
        value = Fraction(token + "0" if token.endswith(".") else token)
        rest = self.tokens[self.at : self.at + 7]
        mixed = len(rest) == 7 and rest[0] in FRACTIONS and rest[1] == rest[4] == "{" and rest[3] == rest[6] == "}"
        if mixed and rest[2].isdigit() and rest[5].isdigit() and token.isdigit():  # 1\frac{4}{5}
            self.at += 7
            return value + Fraction(int(rest[2]), int(rest[5]))
        return value

    def function(self, name: str) -> Value:
        exponent: Value = Fraction(1)
        base: Value | None = None
        while self.peek() in ("^", "_"):
            mark = self.next()
            if mark == "^":
                exponent = self.argument()
            else:
                base = self.argument()
        if self.peek() in ("(", "{", "["):
            value = self.atom()
        else:  # \cot 2x
            value = self.power()
            while self.peek() and re.fullmatch(r"[A-Za-z]|\\pi|\d.*", self.peek()):
                value *= self.power()
        result = (
            FUNCTIONS[name](complex(value)) if base is None else cmath.log(complex(value)) / cmath.log(complex(base))
        )
        return raise_to(result, exponent)


def small(value: Value) -> Value:
    """A rational that has grown large, as a float."""
    if isinstance(value, Fraction) and value.numerator.bit_length() + value.denominator.bit_length() > MOST_BITS:
        return complex(value)
    return value


def magnitude(value: Value) -> Value:
    """|value|."""
    return abs(value) if isinstance(value, Fraction) else complex(abs(value))


def factorial(value: Value) -> Value:
    """value!, of a small whole number. Raises NotAnExpressionError."""
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 400:
        raise NotAnExpressionError("a factorial of no small whole number")
    return Fraction(math.factorial(int(value)))


def raise_to(base: Value, exponent: Value) -> Value:
    """base ** exponent, exact where it is rational and small."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        bits = base.numerator.bit_length() + base.denominator.bit_length()
        if exponent.denominator == 1:
            if bits * abs(exponent) <= MOST_BITS:
                return base ** int(exponent)
        elif exponent.denominator == 2 and base >= 0 and bits * abs(exponent) <= MOST_BITS:
            above, below = math.isqrt(base.numerator), math.isqrt(base.denominator)
            if above**2 == base.numerator and below**2 == base.denominator:
                return Fraction(above, below) ** exponent.numerator
        elif exponent.denominator % 2 and base < 0:  # the real root: (-8)^(1/3) = -2
            return complex(
                -((-float(base)) ** float(exponent)) if exponent.numerator % 2 else (-float(base)) ** float(exponent)
            )
    if base == 0 and not complex(exponent).real > 0:
        raise ZeroDivisionError
    return complex(base) ** complex(exponent)
