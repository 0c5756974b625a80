"""
Write a log in which the type of an event decides which item follows it.

    python examples/studies/planted_types.py planted.csv

Users walk on a ring of items. After a view, the next item is the next one on the ring; after a purchase, it is on the other side
of the ring. A fifth of the events are purchases, of items that do not tell. One event in ten goes to any item.
"""

import csv
import random
import sys


NUM_USERS, NUM_EVENTS, NUM_ITEMS = 1000, 40, 500


def main(path: str) -> None:
    rng = random.Random(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp", "event_type"])
        for user in range(NUM_USERS):
            item = rng.randrange(NUM_ITEMS)
            for time in range(NUM_EVENTS):
                bought = rng.random() < 0.2
                writer.writerow([user, item, 60 * time, "buy" if bought else "view"])
                step = NUM_ITEMS // 2 if bought else 1
                item = rng.randrange(NUM_ITEMS) if rng.random() < 0.1 else (item + step) % NUM_ITEMS


if __name__ == "__main__":
    main(sys.argv[1])
