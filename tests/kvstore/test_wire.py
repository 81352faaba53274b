"""The hand-written framing of segments is the protobuf wire format, both ways."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError

from kvstore.spec import PoolName, RowRange
from kvstore.transfer.stubs.kv_transfer_pb2 import Commit, PushRequest, SegmentHeader
from kvstore.transfer.wire import (
    SegmentMessage,
    code_name,
    decode_request,
    encode_request,
    encode_segment,
    place_of,
)

PLACE = RowRange(PoolName.C4, 128, 300, 4096, 1000)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16_383, 16_384, 3_000_000])
def test_generated_code_reads_what_we_frame(length: int) -> None:
    payload = bytes(i % 251 for i in range(length))
    request = PushRequest.FromString(encode_segment(PLACE, 7, 2**63 + 5, memoryview(payload)))
    assert request.WhichOneof("kind") == "segment"
    assert request.payload == payload
    assert (request.segment.seq, request.segment.checksum) == (7, 2**63 + 5)
    assert place_of(request.segment) == PLACE


@pytest.mark.parametrize("length", [1, 127, 128, 16_384, 3_000_000])
def test_we_read_what_generated_code_writes(length: int) -> None:
    payload = bytes(i % 251 for i in range(length))
    header = SegmentHeader(seq=3, pool="window", row_end=9, length=length, checksum=1)
    message = decode_request(PushRequest(segment=header, payload=payload).SerializeToString())
    assert isinstance(message, SegmentMessage)
    assert message.header == header and message.payload == payload


def test_a_payload_before_its_header_is_legal() -> None:
    ordinary = PushRequest(segment=SegmentHeader(seq=3)).SerializeToString()
    message = decode_request(PushRequest(payload=b"abc").SerializeToString() + ordinary)
    assert isinstance(message, SegmentMessage)
    assert message.header.seq == 3 and message.payload == b"abc"


def test_other_messages_go_through_protobuf() -> None:
    request = PushRequest(commit=Commit(num_segments=3, tail=b"first token"))
    assert decode_request(encode_request(request)) == request
    assert encode_request(b"ready") == b"ready"


@pytest.mark.parametrize("cut", [1, 2, 5, 20, 40])
def test_a_cut_message_is_a_decode_error(cut: int) -> None:
    data = encode_segment(PLACE, 7, 1, memoryview(bytes(100)))
    with pytest.raises(DecodeError):
        decode_request(data[:cut])


def test_a_pool_from_another_version_has_no_place() -> None:
    assert place_of(SegmentHeader(pool="mtp_window")) is None


def test_a_refusal_from_another_version_has_a_name() -> None:
    assert code_name(8) == "GAP"  # type: ignore[arg-type]
    assert code_name(99) == "CODE_99"  # type: ignore[arg-type]
