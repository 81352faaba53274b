"""The scripted workers of the router bench behind the workers' own gRPC services, in a process of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

import grpc

from workers.service import codec
from workers.service.stubs import worker_pb2 as pb
from workers.service.stubs import worker_pb2_grpc


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):  # type: ignore[misc]
    """Prefill over the wire."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    async def Prefill(self, call: Any, context: Any) -> Any:  # noqa: N802
        request, grant = codec.request_from_wire(call.request), codec.grant_from_wire(call.grant)
        return codec.result_to_wire(await self._backend.prefill(request, grant))

    async def Abort(self, call: Any, context: Any) -> Any:  # noqa: N802
        await self._backend.abort(call.request_id)
        return pb.AbortReply()

    async def Stats(self, call: Any, context: Any) -> Any:  # noqa: N802
        return codec.stats_to_wire(await self._backend.stats())


class DecodeServicer(worker_pb2_grpc.DecodeServiceServicer):  # type: ignore[misc]
    """Decode over the wire."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    async def Admit(self, call: Any, context: Any) -> Any:  # noqa: N802
        return codec.grant_to_wire(await self._backend.admit(codec.request_from_wire(call)))

    async def Events(self, call: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        await context.send_initial_metadata(())
        async for batch in self._backend.events(call.router_id):
            yield codec.batch_to_wire(batch.events)

    async def Abort(self, call: Any, context: Any) -> Any:  # noqa: N802
        await self._backend.abort(call.request_id)
        return pb.AbortReply()

    async def Stats(self, call: Any, context: Any) -> Any:  # noqa: N802
        return codec.stats_to_wire(await self._backend.stats())


async def serve(pipe: Connection, prefill: Any, decode: Any) -> None:
    """Listens on 127.0.0.1, sends the port through `pipe`, and stops when something comes back."""
    server = grpc.aio.server()
    worker_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(prefill), server)  # type: ignore[no-untyped-call]
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(decode), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    await asyncio.to_thread(pipe.recv)
    await server.stop(0)
