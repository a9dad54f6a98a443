"""Asking a model at an OpenAI-compatible endpoint, again and again where it is down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

SECONDS = 60.0
"""That an answer may take, unless the caller says otherwise."""
LONGEST_WAIT = 60.0
"""Seconds between two tries."""


class Endpoint:
    """Where a model is asked, in a `with` block that its connections last for.

    It is shown the key in the environment's QMAX_JUDGE_KEY (_TEACHER_, _MODEL_: its part in the run), else that in
    OPENAI_API_KEY.

    failures: how often it did not answer, or not as it should.

    Args:
        url: that ends with the version, such as http://host/v1.
        what: the model's part in the run, in a word.
        model: the name to ask for; empty for the endpoint's first.
        client: to ask with; it is not closed.
        seconds: that an answer may take, where no client is given.
    """

    def __init__(
        self, url: str, what: str, model: str = "", client: httpx.Client | None = None, seconds: float = SECONDS
    ):
        self.url, self._what, self._model, self._seconds = url.rstrip("/"), what, model, seconds
        self._given = self._client = client
        self.failures = 0

    def __enter__(self) -> Endpoint:
        names = (f"QMAX_{self._what.upper()}_KEY", "OPENAI_API_KEY")
        key = next((os.environ[name] for name in names if os.environ.get(name)), "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = self._given or httpx.Client(timeout=self._seconds, headers=headers)
        return self

    def __exit__(self, *_: object) -> None:
        client, self._client = self._client, None
        if client is not None and client is not self._given:
            client.close()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to `body`. Raises httpx.HTTPError or ValueError where there is none."""
        body = {**body, "model": self.name()}
        assert self._client is not None
        return self._client.post(f"{self.url}/{path}", json=body).raise_for_status().json()

    def until(self, once: Callable[[], T], tries: int = 0) -> T | None:
        """What `once` gives as soon as it raises none of the errors of `post`, nor LookupError.

        tries: None is given after so many; 0: it is tried for ever.
        """
        tried = 0
        while True:
            try:
                return once()
            except (httpx.HTTPError, ValueError, LookupError) as error:
                self.failures += 1
                tried += 1
                if tried == tries:
                    return None
                if tried == 1:
                    print(f"the {self._what} at {self.url} does not answer ({error}); asking again", flush=True)
                time.sleep(min(2.0 ** (tried - 2), LONGEST_WAIT))

    def name(self) -> str:
        """The model that is asked. Raises as `post` does, and LookupError, where the endpoint has to name it."""
        if self._model:
            return self._model
        assert self._client is not None
        return self._client.get(f"{self.url}/models").raise_for_status().json()["data"][0]["id"]
