import pytest

from blossomrec_hf.training.journal import MetricsFile


def test_a_continued_log_drops_the_lines_after_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        MetricsFile(path, enabled=True, step=step - 1).write(step=step)
    path.write_text(path.read_text() + '{"step": 4')  # a kill cut the last line
    MetricsFile(path, enabled=True, step=2).write(step=3, again=True)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'


@pytest.mark.parametrize("line", ["[", "[]", "{}", "3"])
def test_a_damaged_line_of_the_log_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match="metrics.jsonl is damaged in line 2"):
        MetricsFile(path, enabled=True, step=3)
