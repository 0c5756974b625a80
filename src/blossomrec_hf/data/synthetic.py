"""The built-in data set: a generated log in which the next item depends on the distant past or on the last few items."""

import numpy as np
import polars as pl


def generate_log(
    num_users: int = 500,
    num_items: int = 240,
    seed: int = 0,
    *,
    num_genres: int = 10,
    taste_length: int = 8,
    return_probability: float = 0.15,
    drift_lag: int = 4,
    walk_length: int = 6,
    num_rings: int = 6,
    min_history: int = 64,
    max_history: int = 128,
    noise: float = 0.03,
) -> pl.DataFrame:
    """
    Generates a log with two planted signals, and events that nothing predicts (fresh starts, noise).

    The catalog has three parts. *Taste items* fall into `num_genres` genres, half of each *classics*, half *novelties*.
    *Drift items* lie on `num_rings` rings in a fixed order. One item, the *door*, ends every ring.

    - **Long-term taste**: a history begins with `taste_length` classics of the user's home genre. Much later, and now and
      then, the door occurs, and the item right after it is a novelty of the home genre. Between the beginning and the
      door are tens or hundreds of drift items, which are independent of the genre.
    - **Short-term drift**: the rest of a history is `drift_lag` walks on rings, interleaved: the next item is the ring
      successor of the item `drift_lag` back. Neither the last item nor any earlier item predicts it. A
      walk ends after `walk_length` items, or at the door if it is one of the `return_probability` walks that lead there.

    A third of the users ends with (walk, walk), a third with (door, novelty) and a third with (novelty, walk), so that
    a third of the leave-one-out targets of validation, and a third of those of the test, depend on the distant past.

    Args:
        num_users (`int`), num_items (`int`): size. Two thirds of the items are taste items.
        seed (`int`): seed of the draw.
        num_genres (`int`): number of genres; a known genre makes its novelties this many times as likely.
        taste_length (`int`): number of classics at the beginning of a history.
        return_probability (`float`): share of walks that end at the door.
        drift_lag (`int`): distance of the item whose ring successor comes next.
        walk_length (`int`): number of items of a walk, which begins at a random place.
        num_rings (`int`): number of rings of drift items.
        min_history (`int`), max_history (`int`): bounds on a history's length.
        noise (`float`): share of events replaced by an item drawn from the whole catalog (never the last two).

    Returns:
        `polars.DataFrame`: `user`, `item` (int64, from 1) and `timestamp` (int64, seconds), by user and time.

    Raises:
        ValueError: if the catalog is too small for the genres and rings, or the bounds leave no room.
    """
    genre_size, ring_size = _sizes(num_items, num_genres, num_rings)
    num_taste = genre_size * num_genres
    if genre_size < 4 or ring_size <= 2 * walk_length:
        raise ValueError(
            f"num_items is {num_items}: too few for {num_genres} genres of at least 4 items and {num_rings} rings longer "
            f"than two walks of {walk_length}; it may be {max(6 * num_genres, (6 * walk_length + 3) * num_rings + 3)} or more."
        )
    if not taste_length + 2 * walk_length * drift_lag < min_history <= max_history:
        raise ValueError(
            f"min_history is {min_history} and max_history {max_history}; min_history may be more than "
            f"{taste_length + 2 * walk_length * drift_lag} (the opening and two rounds of walks), and no more than max_history."
        )
    rng = np.random.default_rng(seed)
    names = rng.permutation(num_taste + num_rings * ring_size + 1) + 1  # so that the number of an item is no signal
    taste = names[:num_taste].reshape(num_genres, 2, genre_size // 2)  # genre, classic or novelty, item
    rings = names[num_taste:-1].reshape(num_rings, ring_size)
    door = int(names[-1])

    def draw_events(classics: np.ndarray, novelties: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """`max_history` events of one user, and the positions of the novelties among them."""
        events = rng.choice(classics, taste_length, replace=taste_length > classics.size).tolist()
        walks: list[list[int]] = [[] for _ in range(drift_lag)]
        returns: list[int] = []
        while len(events) < max_history:
            walk = walks[len(events) % drift_lag]
            if events[-1] == door:
                returns.append(len(events))
                events.append(int(rng.choice(novelties)))
                walk.clear()
                continue
            if not walk:
                if rng.random() < return_probability:
                    walk.extend([door, *rings[rng.integers(num_rings), : -walk_length - 1 : -1].tolist()])
                else:
                    start = rng.integers(ring_size - walk_length + 1)
                    walk.extend(rings[rng.integers(num_rings), start : start + walk_length][::-1].tolist())
            events.append(walk.pop())  # the next item stands last
        return np.array(events), returns

    histories = []
    for user in range(num_users):
        classics, novelties = taste[rng.integers(num_genres)]
        length, kind = int(rng.integers(min_history, max_history + 1)), user % 3
        for _ in range(100):  # until a novelty lies where this kind of history may end
            history, returns = draw_events(classics, novelties)
            endings = [place + kind for place in returns if min_history <= place + kind <= max_history]
            if endings or not kind:
                break
        if endings and kind:
            length = min(endings, key=lambda end: abs(end - length))
        random = rng.random(history.size) < noise
        random[length - drift_lag - 2 :] = False
        history[random] = rng.choice(names, random.sum())
        histories.append(history[:length])
    lengths = np.array([history.size for history in histories])
    return pl.DataFrame(
        {
            "user": np.repeat(np.arange(1, num_users + 1), lengths),
            "item": np.concatenate(histories).astype(np.int64),
            "timestamp": 1_600_000_000 + np.cumsum(rng.integers(1, 3600, lengths.sum())),
        }
    )


def generate_titles(num_items: int = 240, seed: int = 0, *, num_genres: int = 10, num_rings: int = 6) -> pl.DataFrame:
    """
    Generates the titles of the items of [`generate_log`]; the arguments are those that generated the log.

    Returns:
        `polars.DataFrame`: `item` (int64) and `title`: "Genre 3 classic 5", "Genre 3 novelty 2", "Ring 4 stop 7" (its
        successor is stop 8), "The door".
    """
    genre_size, ring_size = _sizes(num_items, num_genres, num_rings)
    titles = [
        f"Genre {genre} {kind} {number}"
        for genre in range(1, num_genres + 1)
        for kind in ("classic", "novelty")
        for number in range(1, genre_size // 2 + 1)
    ]
    titles += [f"Ring {ring} stop {stop}" for ring in range(1, num_rings + 1) for stop in range(1, ring_size + 1)]
    titles.append("The door")
    names = np.random.default_rng(seed).permutation(len(titles)) + 1  # the first draw of `generate_log`
    return pl.DataFrame({"item": names, "title": titles})


def _sizes(num_items: int, num_genres: int, num_rings: int) -> tuple[int, int]:
    """The number of items of a genre (half of them classics), and of a ring."""
    genre_size = 2 * num_items // 3 // num_genres // 2 * 2
    return genre_size, (num_items - genre_size * num_genres - 1) // num_rings
