"""Several copies of one service, asked as if they were one."""

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

from client import Answer, AsyncClient, Options, Piece, ServiceError
from client.client import Headers
from client.request import Prompt

log = logging.getLogger("gateway")
EVERY = 1.0  # seconds between two looks at the replicas


class Replica:
    """One of them. It is asked only while it is listed and says that it is ready; what it has begun it ends."""

    def __init__(self, address: str, client: AsyncClient) -> None:
        self.address, self.client = address, client
        self.listed, self.ready, self.in_flight = True, False, 0


class Replicas:
    """Spreads requests over all addresses of the names given: always to the one that has fewest in flight.

    A name is looked up again and again, so a Kubernetes headless Service's stands for all of its pods.

    Args:
        names: host:port of each service's gRPC.
        connect: makes a client of an address.
    """

    def __init__(self, names: Sequence[str], connect: Callable[[str], AsyncClient] = AsyncClient) -> None:
        self.names, self.connect = names, connect
        self.known: dict[str, Replica] = {}
        self._turn = 0

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.known.values() if replica.listed and replica.ready]

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Keep an eye on the replicas meanwhile."""
        await self.look()
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await asyncio.gather(*(replica.client.close() for replica in self.known.values()))

    async def look(self) -> None:
        """See which replicas there are and which of them are ready."""
        listed = {address for name in self.names for address in await _addresses(name)}
        for address in listed - self.known.keys():
            self.known[address] = Replica(address, self.connect(address))
        for replica in [*self.known.values()]:
            replica.listed = replica.address in listed
            if not replica.listed and not replica.in_flight:
                del self.known[replica.address]
                await replica.client.close()
        await asyncio.gather(*(self._probe(replica) for replica in self.known.values()))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self.look()
            except Exception:
                log.exception("the replicas could not be looked at")

    async def _probe(self, replica: Replica) -> None:
        ready = await replica.client.ready()
        if ready != replica.ready:
            log.info("%s is %s", replica.address, "ready" if ready else "not ready")
        replica.ready = ready

    async def generate(self, prompt: Prompt, options: Options, request_id: str, headers: Headers) -> Answer:
        """As of ``client.AsyncClient``, by any replica; another one is asked if it goes before it has answered."""
        tried: set[str] = set()
        while True:
            replica = self._choose(tried)
            replica.in_flight += 1
            try:
                return await replica.client.generate(prompt, options, request_id, headers)
            except ServiceError as error:
                self._give_up(replica, error, tried)
            finally:
                replica.in_flight -= 1

    async def stream(self, prompt: Prompt, options: Options, request_id: str, headers: Headers) -> AsyncGenerator[Piece, None]:
        """As of ``client.AsyncClient``, by any replica; another one is asked if it goes before the first piece has come."""
        tried: set[str] = set()
        begun = False
        while True:
            replica = self._choose(tried)
            replica.in_flight += 1
            try:
                async with aclosing(replica.client.stream(prompt, options, request_id, headers)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                return
            except ServiceError as error:
                if begun:
                    raise
                self._give_up(replica, error, tried)
            finally:
                replica.in_flight -= 1

    def _choose(self, tried: set[str]) -> Replica:
        """The replica to ask, by turns where several have as few in flight.

        Raises:
            ServiceError: there is none.
        """
        able = [replica for replica in self.ready if replica.address not in tried]
        if not able:
            raise ServiceError("no replica of the service takes requests now", "UNAVAILABLE")
        fewest = min(replica.in_flight for replica in able)
        able = [replica for replica in able if replica.in_flight == fewest]
        self._turn += 1
        return able[self._turn % len(able)]

    def _give_up(self, replica: Replica, error: ServiceError, tried: set[str]) -> None:
        """Pass an error on, unless another replica may do what this one could not."""
        tried.add(replica.address)
        if error.status != "UNAVAILABLE" or all(other.address in tried for other in self.ready):
            raise error
        log.warning("%s, so another one is asked", error)


async def _addresses(name: str) -> list[str]:
    """All IPv4 addresses of a host:port, else its IPv6 ones; none if the name is not known (now)."""
    host, _, port = name.rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError:
        return []
    family = min(entry[0] for entry in found)  # AF_INET is less than AF_INET6
    hosts = {str(address[0]) for kind, _, _, _, address in found if kind == family}
    return sorted(f"[{one}]:{port}" if ":" in one else f"{one}:{port}" for one in hosts)
