"""The command line that grid recipes share."""

import pytest
import torch

from paper.grids import grid_parser, parse_grid


@pytest.fixture
def parse():
    threads = torch.get_num_threads()

    def parsed(*argv):
        return parse_grid(grid_parser("What it does.", output="outputs/x", data="a file", seeds=(0, 1)), argv)

    yield parsed
    torch.set_num_threads(threads)


def test_defaults_and_what_becomes_of_them(parse, tmp_path):
    args = parse("--data", "there")
    assert (args.network, args.seeds, args.shard, args.table) == ("resnet26", [0, 1], (1, 1), False)
    assert args.ledger.as_posix() == "outputs/x/ledger.jsonl"
    args = parse("--table", "--output", str(tmp_path), "--shard", "2/3", "--threads", "2")
    assert args.ledger == tmp_path / "ledger.jsonl"
    assert args.shard == (2, 3)
    assert torch.get_num_threads() == 2
    assert parse("--table", "--ledger", "runs.jsonl").ledger.as_posix() == "runs.jsonl"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--data is needed to train; without it --table draws what the ledger holds"),
        (["--table", "--shard", "3/2"], "--shard 3/2: write i/n with i from 1 to n, such as 1/2 and 2/2"),
        (["--table", "--shard", "0/2"], "--shard 0/2: write i/n"),
        (["--table", "--shard", "half"], "--shard half: write i/n"),
        (["--table", "--network", "vgg"], "invalid choice: 'vgg'"),
    ],
)
def test_what_is_refused(parse, argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err
