"""What a user may type by mistake or by right: negative values, stray words, and help that can be read."""

from __future__ import annotations

import math

import pytest

from instar.cli import main
from instar.cli.arguments import divided, parse, parser, pointed
from instar.errors import UserError


def made():
    """A command with two flags."""
    found = parser("try", "First paragraph.\n\nlist:\n  one  thing\n  two  things")
    found.add_argument("--eps", type=str)
    found.add_argument("--batch_size", type=int)
    found.add_argument("--dry_run", action="store_true")
    found.add_argument("--config", action="config")
    found.add_argument("--target", type=str)
    return found


@pytest.mark.parametrize("value", ["-8/255", "-.5", "-3"])
def test_a_negative_value_reaches_its_flag(value):
    assert parse(made(), ["--eps", value, "--batch-size", "4"]).eps == value


def test_a_stray_word_is_not_called_a_flag():
    with pytest.raises(UserError, match=r"'extra'.*No flag stands before it"):
        parse(made(), ["--eps", "1", "extra"])


def _numbers():
    found = made()
    found.add_argument("--lr", type=float | None)
    found.add_argument("--limit", type=float, default=2.0)
    found.add_argument("--seed", type=int)
    found.add_argument("--name", type=str)
    return found


@pytest.mark.parametrize(
    ("text", "number"),
    [("inf", math.inf), (".inf", math.inf), ("-Inf", -math.inf), ("1/4", 0.25), ("-1/4", -0.25), ("2e-3", 2e-3)],
)
def test_a_number_may_be_written_as_the_configuration_is_printed(text, number, tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text(f"limit: {text}\nname: a/b\n")
    for words in (["--limit", text], [f"--limit={text}"], ["--config", str(file)]):
        assert parse(_numbers(), words).limit == number
    assert parse(_numbers(), ["--lr", text]).lr == number
    assert math.isnan(parse(_numbers(), ["--limit", "nan"]).limit)


@pytest.mark.parametrize("text", ["inf", "nan", "1/4"])
def test_what_is_no_number_stays_text(text, tmp_path):
    assert parse(_numbers(), ["--name", text, "--limit", "3"]).name == text
    file = tmp_path / "words.yaml"
    file.write_text(f"name: {text}\n")
    assert parse(_numbers(), ["--config", str(file)]).name == text
    for flag, value in (("--seed", text), ("--limit", "1/0"), ("--limit", "8/")):
        with pytest.raises(UserError, match=f"^{flag}: expected"):
            parse(_numbers(), [flag, value])


def test_a_printed_configuration_is_read_back(tmp_path, capsys):
    words = ["train", "pgd_at", "--weight-decay", "1/3", "--loss-limit", "inf", "--print-config"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "weight_decay: 1/3\n" in printed
    assert "loss_limit: inf\n" in printed
    (tmp_path / "c.yaml").write_text(printed, encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_an_unknown_flag_names_the_nearest_ones_and_the_help_and_nothing_else():
    with pytest.raises(UserError) as caught:
        parse(made(), ["--batch-sise", "3"])
    assert str(caught.value) == "unknown flag 'batch-sise'. Did you mean 'batch-size'? All flags: instar try --help"
    with pytest.raises(UserError) as caught:
        parse(made(), ["--zzzz", "3"])
    assert str(caught.value) == "unknown flag 'zzzz'. All flags: instar try --help"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--extra-fraction", "2"], "extra_fraction = 2.0 needs extra, the file of images"),
        (["--extra-smoothing", "0.1"], "extra_smoothing = 0.1 needs extra"),
        (["--selection", "inf"], "selection must be a positive number of images"),
        (["--lr", "inf"], "lr must be a finite number of at least 0; got inf"),
        (["--steps", "ten"], "steps of pgd_at must be int or Schedule; got 'ten'"),
        (["--eps", "wide"], "eps of pgd_at must be float or Schedule; got 'wide'"),
    ],
)
def test_a_value_that_cannot_be_meant_is_one_line_of_train(words, message, tmp_path, capsys):
    assert main(["train", "pgd_at", *words, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["doctor", "--recipe", "pgd_at", "--seconds", "nan"], "seconds for the probe must be a number above 0"),
        (["doctor", "--recipe", "pgd_at", "--seconds", "-1"], "must be a number above 0, for example 20; got -1.0"),
        (["doctor", "--device", "gpu"], "device 'gpu' cannot be used here: expected auto, cpu, cuda, or cuda:1"),
        (["evaluate", "run", "--device", "gpu"], "cannot be used here: expected auto, cpu, cuda, or cuda:1 for the"),
        (["evaluate", "run", "--config", "file.txt"], "--config: the file must be a mapping of names to values"),
        (["report", "list"], "list/run.json is not the description of a run, or damaged"),
        (["report", "empty"], "empty/run.json is not the description of a run: it says nothing of 'data'"),
        (["train", "--resume", "--out", "empty"], "empty/run.json is not the description of a run: it says nothing of"),
        (["train", "--resume", "--out", "part"], "part/run.json is damaged: its training says nothing of 'epochs'"),
        (
            ["train", "pgd_at", "--steps", "1000000000"],
            "must be a whole number of at least 0 and at most 1,000,000; got",
        ),
        (
            ["train", "pgd_at", "--init", "file.txt"],
            "file.txt is no file of torch.save, or damaged; copy or download it again",
        ),
    ],
)
def test_what_a_hostile_user_gives_is_one_line_that_tells_what_is_wrong(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("hello\n")
    part = '{"recipe": "pgd_at", "method": "", "training": {"data": "", "model": null}, "data": {}, "model": {}}'
    for name, content in (("list", "[]"), ("empty", "{}"), ("part", part)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_help_keeps_the_lines_of_a_list():
    assert "\n  one  thing\n  two  things\n" in made().format_help()


def test_about_is_refused_where_no_entry_is_written(capsys):
    assert main(["evaluate", "nowhere", "--suite", "quick", "--about", "name=x"]) == 2
    assert "--about is for --suite robustbench, which alone writes an entry" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--n", "--batch-size"])
def test_doctor_refuses_counts_below_one(flag, capsys):
    assert main(["doctor", "nowhere", flag, "0"]) == 2
    assert "must be at least 1; got 0" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_dashes_and_underscores_are_one(flag, tmp_path):
    assert parse(made(), [flag, "4"]).batch_size == 4
    file = tmp_path / "words.yaml"
    file.write_text(f"{flag[2:]}: 4\n")
    assert parse(made(), ["--config", str(file)]).batch_size == 4
    assert divided(made(), ["a", flag, "4", "b"]) == (["a", "b"], [flag, "4"])
    assert divided(made(), [flag.replace("batch", "dry").replace("size", "run"), "b"])[0] == ["b"]


def test_a_name_that_stands_in_a_file_in_both_ways_is_refused(tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text("batch-size: 4\nbatch_size: 5\n")
    with pytest.raises(UserError, match="batch_size twice"):
        parse(made(), ["--config", str(file)])


def test_help_and_complaints_write_dashes():
    assert "--batch-size" in made().format_help()
    assert "--batch_size" not in made().format_help()
    with pytest.raises(UserError, match=r"unknown flag 'batch-sice'. Did you mean 'batch-size'"):
        parse(made(), ["--batch_sice", "4"])
    with pytest.raises(UserError, match=r"^--batch-size: expected int"):
        parse(made(), ["--batch_size", "many"])


def test_a_target_may_stand_behind_the_flags():
    assert pointed(made(), ["--batch-size", "4", "run"]) == ["--target", "run", "--batch-size", "4"]
    with pytest.raises(UserError, match="try takes one target; got a and b"):
        pointed(made(), ["a", "--eps", "1", "b"])
    with pytest.raises(UserError, match="try takes one target; got a and --target"):
        pointed(made(), ["a", "--target=b"])


@pytest.mark.parametrize(
    "words",
    [
        ["train", "pgd_at", "--batch-size", "100000"],
        ["train", "pgd_at", "--eps", "8"],
        ["train", "pgd_at", "--device", "tpu"],
        ["train", "pgd_at", "--selection", "100000"],
    ],
)
def test_refused_settings_have_no_heading(words, tmp_path, capsys):
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1


def test_report_refuses_a_negative_number_of_examples_before_it_looks_at_runs(capsys):
    assert main(["report", "nowhere", "--examples", "-1"]) == 2
    assert "--examples must be a number of test images" in capsys.readouterr().err


def test_explain_names_the_backward_pass_through_a_gradient(capsys):
    assert main(["explain", "grad_align"]) == 0
    assert "1 full backward (× 2), 1 double backward (× 4): 13 forward units" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["get"], ["check"], ["get", "digits", "mnist"]])
def test_data_wants_one_name(words, capsys):
    assert main(["data", *words]) == 2
    assert capsys.readouterr().err.startswith(("instar: which data set?", "instar: instar data get takes one name"))


@pytest.mark.parametrize("command", ["evaluate", "doctor", "analyse"])
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--width", "16"], "--width belongs to --model"),
        (["--model", "resnet18", "--width", "0"], "--width must be at least 1; got 0"),
        (["--epz", "8/255"], "unknown flag 'epz'. Did you mean 'eps'"),
    ],
)
def test_commands_refuse_what_they_would_not_use(command, words, line, tmp_path, capsys):
    (tmp_path / "net.pt").write_bytes(b"")
    assert main([command, str(tmp_path / "net.pt"), *words]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("recipe: 3", "recipe in the configuration run.yaml must be a name; got 3"),
        ("{recipe: trades, preset: 3}", "preset in the configuration run.yaml must be a name; got 3"),
        ("{recipe: trades, resume: 7}", "--resume: expected true or false. Got value: 7"),
        ("{recipe: trades, lr: .nan}", "lr must be a finite number of at least 0; got nan"),
        ("{recipe: trades, lr: fast}", "--lr: expected float or null. Got value: fast"),
        ("{recipe: trades, mix: blend}", "--mix: expected one of 'none', 'cutmix', 'mixup'. Got value: blend"),
        ("{recipe: trades, weight-decay: -3}", "weight_decay must be 0 or larger; got -3"),
        ("{recipe: trades, save_every: -3}", "save_every must be at least 0; got -3"),
        ("{recipe: trades, drops: 3}", "such as ((0.5, 0.1), (0.75, 0.01)); got 3"),
    ],
)
def test_a_wrong_value_in_a_file_is_one_line(text, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", "--config", "run.yaml", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["attack.steps=3", "[attack.steps=3]", "{attack.steps: 3}"])
def test_a_file_may_hold_changes_as_text_list_or_mapping(text, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"recipe: pgd_at\nset: {text}\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]) == 0
    assert "steps=3" in capsys.readouterr().out.splitlines()[0]


def test_a_resume_refuses_an_impossible_setting_of_its_own(tmp_path, capsys):
    words = ["--data", "digits", "--epochs", "1", "--width", "2", "--steps", "1", "--batch-size", "512"]
    assert main(["train", "pgd_at", *words, "--out", str(tmp_path / "run")]) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--accumulate", "0"]) == 2
    assert "accumulate must be at least 1; got 0" in capsys.readouterr().err
