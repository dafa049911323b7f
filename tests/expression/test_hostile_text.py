"""Text from outside: what the whitelist does not know is refused in one line, and nothing is ever run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import instar as I
from instar.expression import known, parse
from instar.signals import Constant

HOSTILE = {
    "a call of a builtin": "__import__('os')",
    "a call of eval": "eval('1')",
    "a call of open": "open('/etc/passwd')",
    "a call of getattr": "getattr(KL, 'needs')",
    "an attribute": "KL().needs",
    "an attribute of a number": "(1).real",
    "a dunder attribute": "KL().__class__.__mro__",
    "a method call": "KL().__init__()",
    "a dunder name": "__builtins__",
    "a subscript": "(1, 2)[0]",
    "a slice": "KL()[0:1]",
    "a lambda": "lambda: 1",
    "a called lambda": "(lambda: 1)()",
    "a list comprehension": "[x for x in (1, 2)]",
    "a generator": "Steps(x for x in (1,))",
    "a dict": "{1: 2}",
    "a set": "{1, 2}",
    "an f-string": "f'{KL()}'",
    "bytes": "b'abc'",
    "a complex number": "3j",
    "an ellipsis": "...",
    "a comparison": "1 < 2",
    "a boolean operation": "True and False",
    "a negation": "not True",
    "an inversion": "~3",
    "a condition": "1 if True else 2",
    "a walrus": "(x := 1)",
    "a starred argument": "Linf(*(0.1,))",
    "a starred tuple": "(*(1, 2), 3)",
    "a double star": "Linf(**{'eps': 0.1})",
    "an await": "await KL()",
    "a yield": "(yield 1)",
    "a statement": "import os",
    "an assignment": "x = 1",
    "two statements": "KL(); KL()",
    "a line break": "KL()\n+ KL()",
    "a comment": "# KL()",
    "nothing": "",
    "white space": " \t\n ",
    "an unclosed bracket": "Linf(0.1",
    "a power": "2 ** 3",
    "a tower of powers": "9 ** 9 ** 9 ** 9",
    "a shift": "1 << 10000000",
    "a modulus": "7 % 2",
    "a floor division": "7 // 2",
    "a matrix product": "KL() @ KL()",
    "a repeated string": "'a' * 1000000000",
    "a repeated tuple": "(1,) * 1000000000",
    "joined strings": "'a' + 'b'",
    "a product of None": "None * KL()",
    "a truth value as a weight": "True * KL()",
    "a signal divided": "KL() / 2",
    "a division by a signal": "2 / KL()",
    "a division by zero": "1 / 0",
    "a ball multiplied": "2 * Linf(0.1)",
    "a negative attack": "-PGD()",
    "a bare name": "KL",
    "a name in a product": "2 * KL",
    "a call of a call": "KL()()",
    "a call of a string": "'KL'()",
    "an argument too many": "KL(1)",
    "an argument missing": "Linf()",
    "a repeated argument": "Linf(0.1, eps=0.2)",
    "an argument twice": "Linf(eps=0.1, eps=0.2)",
    "a null byte": "KL()\0",
    "a lone surrogate": "\ud800",
    "an integer of 5000 digits": "9" * 5000,
    "a quotient of huge integers": "9" * 4000 + " / 7",
    "a huge integer as a float": "9" * 400 + " * 1.5",
    "a huge radius": "Linf(" + "9" * 400 + ")",
    "a huge negative radius": "L2(-" + "9" * 400 + ")",
    "an integer too long to print": "AWP(-" + "9" * 4000 + " * " + "9" * 4000 + ")",
    "brackets": "(" * 5000 + "1" + ")" * 5000,
    "signs": "-" * 5000 + "1",
    "a long sum": "1" + " + 1" * 5000,
    "a deep call": "RankWeight(" * 100 + "KL()" + ")" * 100,
    "deep inversions": "~" * 900 + "1",
    "deep negations": "not " * 900 + "1",
    "deep attributes": "a" + ".b" * 900,
    "deep lambdas": "lambda: " * 900 + "1",
    "deep subscripts": "a" + "[0]" * 900,
    "deep conditions": "1 if 1 else " * 500 + "1",
    "20,001 characters": "1" + " " * 20_000,
}


def _refused(text: str) -> str:
    with pytest.raises(I.UserError) as caught:
        parse(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1500
    assert caught.value.__cause__ is None
    return message


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_refused_in_one_line(text: str) -> None:
    _refused(text)


def test_nothing_in_a_text_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "made"
    for text in (
        f"__import__('os').mkdir({str(target)!r})",
        f"Linf(__import__('os').mkdir({str(target)!r}))",
        f"Linf(eps=[__import__('os').mkdir({str(target)!r}) for x in (1,)][0])",
        f"f'{{__import__(\"os\").mkdir({str(target)!r})}}'",
        "print('run')",
    ):
        _refused(text)
    assert not target.exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("GeometryWeigth(-1)", "unknown value 'GeometryWeigth'. Did you mean 'GeometryWeight'"),
        ("2 * Margn()", "unknown value 'Margn'. Did you mean 'Margin'"),
        ("Crossentropy()", "Did you mean 'CrossEntropy'"),
        ("Linf(epps=0.1)", "unknown field of Linf 'epps'. Did you mean 'eps'? Known: eps"),
        ("PGD(stepsize=0.1)", "unknown field of PGD 'stepsize'. Did you mean 'step_size'"),
        ("KL", "KL needs its arguments: write KL(...)"),
        ("Linf(8)", "eps of Linf must be in [0, 1] because inputs lie in [0, 1]; got 8. Did you mean 8/255?"),
        (
            "CrossEntropy('advv')",
            "of of CrossEntropy must be one of 'adv', 'clean', 'anchor', 'anchor_adv'; got 'advv'",
        ),
        ("Exceeds(ProbabilityGap(), Ramp(0, 0.4, 0.7, 0.3))", "times of Ramp must be non-negative and in ascending"),
        ("x" * 20_001, "an expression may have 20000 characters; got 20001"),
        ("KL(" * 70 + ")" * 70, "is nested more than 60 levels deep"),
        ("Linf(**{})", "** cannot be used in an expression"),
        ("KL().needs", "'KL().needs' is not allowed in an expression: use names of values and numbers"),
    ],
)
def test_the_line_says_what_was_expected_and_what_was_meant(text: str, message: str) -> None:
    assert message in _refused(text)


def test_the_longest_text_that_is_allowed_is_read() -> None:
    assert parse(" " * 19_999 + "1") == 1
    assert parse("(" * 50 + "1" + ")" * 50) == 1
    assert parse("+" * 50 + "1") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tanh", "tanh"),
        ("cosine_head", "cosine_head"),
        ("inf", math.inf),
        ("None", None),
        ("True", True),
        ("8/255", 8 / 255),
    ],
)
def test_a_single_word_stands_for_itself_where_a_shell_user_types_it(text: str, expected: object) -> None:
    assert parse(text, words=True) == expected


def test_words_stand_for_themselves_only_alone_and_only_where_asked_for() -> None:
    for text, words in (("tanh", False), ("tanh + 1", True), ("(tanh,)", True), ("a.b", True)):
        with pytest.raises(I.UserError):
            parse(text, words=words)


def _either_a_value_or_one_line(text: str) -> None:
    refused = None
    try:
        found = parse(text)
    except I.UserError as error:
        refused = str(error)
    if refused is not None:
        assert "\n" not in refused
    elif "nan" not in repr(found) and not isinstance(found, (str, Constant)):  # a constant alone prints its number
        assert parse(repr(found)) == found


quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@settings(max_examples=150, suppress_health_check=quiet)
@given(st.text(max_size=40))
def test_any_text_is_a_value_or_one_line(text: str) -> None:
    _either_a_value_or_one_line(text)


TOKENS = [
    *"()[]{},.:=+-*/~<>", " ", "**", "1", "0.5", "8/255", "inf", "None", "'a'", "x", "_", "lambda ", " for x in ",
    "not ", " if ", " else ", "KL()", "KL", "Linf(", "PGD(", "Method(", "Steps(", "Sum(", "eps=", "steps=",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@settings(max_examples=300, suppress_health_check=quiet)
@given(st.lists(st.sampled_from(TOKENS), max_size=12).map("".join))
def test_any_heap_of_tokens_is_a_value_or_one_line(text: str) -> None:
    _either_a_value_or_one_line(text)


ODD = [
    "3", "-3", "0", "0.5", "'a'", "''", "None", "True", "()", "(1, 2)", "((1, 2),)", "('a', 'b')", "(('a', KL()),)",
    "inf", "-inf", "nan", "1e308", "1.5", "9" * 400, "-" + "9" * 400, "KL()", "2 * KL()", "Linf(0.1)", "PGD()",
    "Zero()", "Ramp(0, 1)", "Steps('a')", "EMA()", "AWP()", "NoAttack()", "Progress(1, 2)",
]  # fmt: skip

OWN = {name: cls for name, cls in known().items() if cls.__module__.startswith("instar.")}


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_field_of_any_kind_is_taken_or_refused_in_one_line(name: str) -> None:
    names: list[Any] = list(OWN[name].__dataclass_fields__)
    usual = {
        "Exceeds": "KL(), 1", "Method": "PGD(), KL()", "Ramp": "0, 1", "Sum": "KL(), KL()", "Product": "KL(), KL()",
        "Progress": "1, 2",
    }.get(name, "")  # fmt: skip
    for odd in ODD:
        _either_a_value_or_one_line(f"{name}({odd})")
        _either_a_value_or_one_line(f"{name}({odd}, {odd})")
        for place, field in enumerate(names):
            before = ", ".join(usual.split(", ")[:place]) if usual else ""
            _either_a_value_or_one_line(f"{name}({before + ', ' if before else ''}{field}={odd})")
