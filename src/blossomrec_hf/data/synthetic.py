"""The built-in data set: a generated log in which the distant past and the last few items both tell the next one."""

import numpy as np
import polars as pl


def generate_log(
    num_users: int = 1000,
    num_items: int = 400,
    seed: int = 0,
    *,
    min_history: int = 60,
    max_history: int = 200,
    genre_size: int = 20,
    session_length: int = 6,
    return_probability: float = 0.5,
    noise: float = 0.05,
) -> pl.DataFrame:
    """
    Generates a log of sessions with two planted signals.

    Items fall into genres of `genre_size`. Each user has a *playlist*: `session_length` items of a home genre in an
    order of their own, drawn once. A history is a chain of sessions. With `return_probability` a session *returns*: it
    opens with a marker item of the home genre, the same for all users, and then plays the user's playlist in its
    order. Which items those are only the user's own earlier returns tell, and they lie tens of items back: **long-term
    taste**. Otherwise a session *drifts* through a genre drawn at random: from item a the next is a's successor, on a
    ring through the genre that is the same for all users: **short-term drift**. `noise` of the events are drawn at
    random from all items.

    Args:
        num_users (`int`), num_items (`int`): size; `num_items` is rounded down to whole genres.
        seed (`int`): same seed, same log.
        min_history, max_history (`int`): history lengths are uniform between them.
        genre_size (`int`): items in a genre.
        session_length (`int`): events in a session.
        return_probability (`float`): share of sessions that return to the playlist.
        noise (`float`): share of events drawn at random.

    Returns:
        `polars.DataFrame`: `user` (int64, from 1), `item` (int64, from 1), `timestamp` (int64, seconds), by user and time.
    """
    num_genres = num_items // genre_size
    if num_genres < 3 or not 2 <= session_length < genre_size:
        raise ValueError(
            f"num_items is {num_items} and session_length {session_length}; with genres of {genre_size} they may be at "
            f"least {3 * genre_size} and 2 to {genre_size - 1}."
        )
    rng = np.random.default_rng(seed)
    ring = np.stack([rng.permutation(genre_size) + genre * genre_size for genre in range(num_genres)])
    histories = []
    for _ in range(num_users):
        length = int(rng.integers(min_history, max_history + 1))
        home = int(rng.integers(num_genres))
        playlist = rng.choice(ring[home][1:], session_length, replace=False)
        events: list[int] = []
        while len(events) < length:
            if rng.random() < return_probability:
                session = [ring[home][0], *playlist]
            else:
                genre, start = (home + rng.integers(1, num_genres)) % num_genres, rng.integers(genre_size)
                session = ring[genre][(start + np.arange(session_length)) % genre_size]
            events.extend(session)
        history = np.array(events[:length])
        random = rng.random(length) < noise
        history[random] = rng.integers(num_genres * genre_size, size=random.sum())
        histories.append(history)
    lengths = np.array([history.size for history in histories])
    gaps = rng.integers(1, 3600, lengths.sum())
    return pl.DataFrame(
        {
            "user": np.repeat(np.arange(1, num_users + 1), lengths),
            "item": np.concatenate(histories).astype(np.int64) + 1,
            "timestamp": 1_600_000_000 + np.cumsum(gaps),
        }
    )
