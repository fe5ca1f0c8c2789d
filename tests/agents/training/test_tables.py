import pytest

from agents.training.tables import Table, read_table


def test_the_table_forgets_what_lies_after_the_checkpoint(tmp_path):
    table = Table(tmp_path / "t.csv", 0)
    for i in range(1, 5):
        table.append({"iteration": i, "reward": i / 3})
    with (tmp_path / "t.csv").open("a") as file:
        file.write("5,0.3")  # a line cut off by a crash
    Table(tmp_path / "t.csv", 2).append({"iteration": 3, "reward": 0.5})
    assert (tmp_path / "t.csv").read_text().splitlines()[-2:] == [f"2,{2 / 3}", "3,0.5"]


def test_a_rewards_name_may_hold_any_words(tmp_path):
    name = 'réward "$a_b$", 奖'
    Table(tmp_path / "t.csv", 0).append({"iteration": 1, name: 0.5})
    Table(tmp_path / "t.csv", 1).append({"iteration": 2, name: 0.25})
    assert read_table(tmp_path / "t.csv") == [{"iteration": 1, name: 0.5}, {"iteration": 2, name: 0.25}]


def test_a_row_that_the_table_has_no_columns_for_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text("iteration,a\n1,2.0\n")
    table = Table(tmp_path / "table.csv", 1)
    with pytest.raises(RuntimeError, match=r"table\.csv is another run's: it has no b"):
        table.append({"iteration": 2, "b": 3.0})
    assert read_table(tmp_path / "table.csv") == [{"iteration": 1.0, "a": 2.0}]
