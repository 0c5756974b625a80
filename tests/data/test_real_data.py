"""Small pieces of real logs, and the real logs at hand: one `blossomrec prepare` command each, and the known counts."""

import os
from pathlib import Path

import pytest
from datasets import load_from_disk

from blossomrec_hf.commands import prepare
from blossomrec_hf.data.filters import FilterReport
from blossomrec_hf.model.tokenization_blossomrec import BlossomRecTokenizer


DATA = Path(os.environ.get("BLOSSOMREC_TEST_DATA", "nowhere"))

PIECES = {
    "UserBehavior.csv": (
        "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,pv,1511561733\n1,2576651,149192,cart,1511572885\n"
        "2,2268318,2520377,buy,1511544071\n2,1,7,pv,1511544000\n",
        [[2268318, 2333346, 2576651], [1, 2268318]],
    ),
    "yoochoose-clicks.dat": (
        "1,2014-04-07T10:51:09.277Z,214536502,0\n1,2014-04-07T10:54:09.868Z,214536500,0\n"
        "2,2014-04-07T13:56:37.614Z,214662742,S\n",
        [[214536502, 214536500], [214662742]],
    ),
    "rees46.csv": (
        "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session\n"
        "2019-10-01 00:00:05 UTC,view,7,21,,shiseido,35.79,1001,72d76fde-8bb3\n"
        "2019-10-01 00:00:01 UTC,purchase,3900821,20,appliances.water_heater,aqua,33.20,1001,72d76fde\n",
        [[3900821, 7]],
    ),
    "otto.jsonl": (
        '{"session":1,"events":[{"aid":5,"ts":1661724000278,"type":"clicks"},{"aid":6,"ts":1661724000378,"type":"carts"}]}\n'
        '{"session":2,"events":[{"aid":6,"ts":1661724058352,"type":"carts"}]}\n',
        [[5, 6], [6]],
    ),
    "bx_ratings.csv": ('"User-ID";"ISBN";"Book-Rating"\n"1";"034545104X";"0"\n"2";"0155061224";"5"\n', [["034545104X"], ["0155061224"]]),
}  # fmt: skip


def prepared(source: Path, output: Path) -> tuple:
    prepare.main([str(source), "--output_dir", str(output)])
    return load_from_disk(output), BlossomRecTokenizer.from_pretrained(output), FilterReport.load(output)


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_of_a_real_log_is_read_without_options(tmp_path, name):
    text, items = PIECES[name]
    (tmp_path / name).write_text(text)
    dataset, tokenizer, report = prepared(tmp_path / name, tmp_path / "out")
    assert [tokenizer.decode_items(ids) for ids in dataset["input_ids"]] == items
    assert report.bad_rows == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data here")
@pytest.mark.parametrize(
    "name, users, items, events",
    [
        ("ml-1m/interactions.txt", 6040, 3416, 999_611),
        ("ml-1m/with_times.parquet", 6038, 3416, 999_508),
        ("gowalla/checkins.parquet", 8685, 13_812, 507_197),
        ("foursquare/checkins.parquet", 1083, 9989, 179_468),
        ("taobao/events.parquet", 815, 55_368, 84_475),
        ("online-retail/transactions.parquet", 4372, None, 406_829),
        ("amazon/Beauty_s3rec.txt", 22_363, 12_101, 198_502),
        ("amazon/Beauty_bert4rec.txt", 40_226, 54_542, 353_962),
        ("amazon/Video_Games_sasrec.txt", 31_013, 23_715, 287_107),
        ("ml-100k/ml-100k.inter", 943, 1682, 100_000),
        ("ml-latest-small/ratings.csv", 610, 9724, 100_836),
    ],
)
def test_a_real_log_is_read_without_options(tmp_path, name, users, items, events):
    dataset, tokenizer, report = prepared(DATA / name, tmp_path / "out")
    assert len(dataset) == users and sum(dataset["test_end"]) == events and report.bad_rows == 0
    assert items is None or len(tokenizer) - 2 == items
