"""The requests and responses of `blossomrec serve`."""

from itertools import pairwise

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator


Item = StrictInt | StrictStr


class Query(BaseModel):
    """Either a history, or a user with new events (possibly none)."""

    model_config = ConfigDict(extra="forbid")
    history: list[Item] | None = Field(None, description="raw item ids, latest item last; nothing is stored")
    user: str | None = Field(
        None, min_length=1, max_length=256, description="id of the user whose stored events and `events` are read"
    )
    events: list[Item] = Field([], description="raw ids of the user's new items, latest item last; all are stored")
    timestamps: list[StrictInt] | None = Field(
        None,
        description="the time of each item of `history` or `events` in seconds since 1970, never falling; by default, the time "
        "of the request for `events`, while `history` needs it if the model reads times; those of `events` are at most a day "
        "ahead of the service's clock",
    )
    event_types: list[StrictStr | None] | None = Field(
        None,
        description="the type of each item of `history` or `events`, null if it is unknown; by default, unknown for `events`, "
        "while `history` needs it if the model reads event types",
    )
    now: StrictInt | None = Field(
        None,
        description="the time for which to recommend, in seconds since 1970; by default, unknown. Models that do not use it "
        "ignore it",
    )
    target_event_type: StrictStr | None = Field(
        None,
        description="the type of the event to recommend for, one of the model's; by default, the first of its target types",
    )
    top_k: int = Field(10, ge=1, description="number of items to return, at most the catalog")
    exclude_seen: bool | None = Field(
        None,
        description="whether to exclude items of the history (the part that the model reads); by default, they are excluded "
        "unless users of the training log repeat items",
    )
    exclude: list[Item] = Field([], description="further items to exclude")
    candidates: list[Item] | None = Field(None, description="items to choose from; by default, the whole catalog")

    @model_validator(mode="after")
    def _one_of_both(self) -> "Query":
        if (self.history is None) == (self.user is None) or (self.user is None and self.events):
            raise ValueError("give either `history`, or `user` with `events`")
        return self

    @model_validator(mode="after")
    def _one_value_per_item(self) -> "Query":
        items = self.events if self.history is None else self.history
        for name in ("timestamps", "event_types"):
            values = getattr(self, name)
            if values is not None and len(values) != len(items):
                raise ValueError(f"`{name}` has {len(values)} values for {len(items)} items; give one each")
        times = self.timestamps or []
        for before, after in pairwise(times):
            if after < before:
                raise ValueError(f"`timestamps` goes backwards, from {before} to {after}; sort the items by time")
        if times and self.now is not None and self.now < times[-1]:
            raise ValueError(f"`now` is {self.now}, before the last item at {times[-1]}")
        return self


class Recommendation(BaseModel):
    item: int | str
    score: float


class Answer(BaseModel):
    items: list[Recommendation]
    unknown: list[int | str] = Field(
        description="items of the request outside the model's vocabulary, which are not read"
    )
    unknown_types: list[str] = Field(
        description="event types of the request that the model does not have; their events are read as of unknown type"
    )
    length: int = Field(description="number of items that the model read")
    popular: bool = Field(
        description="whether the history was empty; the items are then the most frequent ones, scored by their counts"
    )


class Problem(BaseModel):
    """The body of a response with another status than 200 and 422."""

    detail: str


def refused(name: str, message: str) -> RequestValidationError:
    """An error with status 422 about the field `name` of the body."""
    return RequestValidationError([{"loc": ("body", name), "msg": message, "type": "value_error"}])
