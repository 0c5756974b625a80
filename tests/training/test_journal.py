import pytest

from blossomrec_hf.training.journal import MetricsFile


def test_a_continued_log_drops_the_lines_after_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        MetricsFile(path, enabled=True, step=step - 1).write(step=step)
    path.write_text(path.read_text() + '{"step": 4')  # a kill cut the last line
    MetricsFile(path, enabled=True, step=2).write(step=3, again=True)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


def test_a_continued_log_has_the_line_of_a_validation_once(tmp_path):
    """The run was killed after it had validated and before the next checkpoint, and validates again."""
    path = tmp_path / "metrics.jsonl"
    for step in (None, 2):
        log = MetricsFile(path, enabled=True, step=step)
        log.write(step=2, validation=0.5)
    log.write(step=2, loss=0.25)
    log.write(step=4, validation=0.5)
    assert path.read_text() == (
        '{"step": 2, "validation": 0.5}\n{"step": 2, "loss": 0.25}\n{"step": 4, "validation": 0.5}\n'
    )


@pytest.mark.parametrize("line", ["[", "[]", "{}", "3"])
def test_a_damaged_line_of_the_log_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match="metrics.jsonl is damaged in line 2"):
        MetricsFile(path, enabled=True, step=3)
