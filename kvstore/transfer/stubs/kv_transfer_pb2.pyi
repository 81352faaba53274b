from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PushRequest(_message.Message):
    __slots__ = ("open", "segment", "commit", "abort", "renew", "payload")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    open: Open
    segment: SegmentHeader
    commit: Commit
    abort: Abort
    renew: Renew
    payload: bytes
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., segment: _Optional[_Union[SegmentHeader, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("version", "request_id", "epoch", "num_tokens", "payload_bytes", "fingerprint", "model_hash", "checksum_name")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_HASH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_NAME_FIELD_NUMBER: _ClassVar[int]
    version: int
    request_id: str
    epoch: int
    num_tokens: int
    payload_bytes: int
    fingerprint: str
    model_hash: str
    checksum_name: str
    def __init__(self, version: _Optional[int] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., num_tokens: _Optional[int] = ..., payload_bytes: _Optional[int] = ..., fingerprint: _Optional[str] = ..., model_hash: _Optional[str] = ..., checksum_name: _Optional[str] = ...) -> None: ...

class SegmentHeader(_message.Message):
    __slots__ = ("seq", "pool", "row_start", "row_end", "offset", "length", "checksum")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    ROW_START_FIELD_NUMBER: _ClassVar[int]
    ROW_END_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    seq: int
    pool: str
    row_start: int
    row_end: int
    offset: int
    length: int
    checksum: int
    def __init__(self, seq: _Optional[int] = ..., pool: _Optional[str] = ..., row_start: _Optional[int] = ..., row_end: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("num_segments", "num_bytes", "tail", "tail_checksum")
    NUM_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    TAIL_CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    num_segments: int
    num_bytes: int
    tail: bytes
    tail_checksum: int
    def __init__(self, num_segments: _Optional[int] = ..., num_bytes: _Optional[int] = ..., tail: _Optional[bytes] = ..., tail_checksum: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("opened", "ack", "committed", "refused")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    ack: Ack
    committed: Committed
    refused: Refused
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("credit_bytes", "lease_s")
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    credit_bytes: int
    lease_s: float
    def __init__(self, credit_bytes: _Optional[int] = ..., lease_s: _Optional[float] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("seq", "length", "duplicate")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    length: int
    duplicate: bool
    def __init__(self, seq: _Optional[int] = ..., length: _Optional[int] = ..., duplicate: bool = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("num_segments", "num_bytes")
    NUM_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_segments: int
    num_bytes: int
    def __init__(self, num_segments: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("code", "message")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Refused.Code]
        NO_GRANT: _ClassVar[Refused.Code]
        STALE_EPOCH: _ClassVar[Refused.Code]
        BUSY: _ClassVar[Refused.Code]
        SPEC_MISMATCH: _ClassVar[Refused.Code]
        MISPLACED: _ClassVar[Refused.Code]
        CREDIT_EXCEEDED: _ClassVar[Refused.Code]
        CHECKSUM: _ClassVar[Refused.Code]
        GAP: _ClassVar[Refused.Code]
        LEASE_EXPIRED: _ClassVar[Refused.Code]
        REVOKED: _ClassVar[Refused.Code]
        PROTOCOL: _ClassVar[Refused.Code]
    UNSPECIFIED: Refused.Code
    NO_GRANT: Refused.Code
    STALE_EPOCH: Refused.Code
    BUSY: Refused.Code
    SPEC_MISMATCH: Refused.Code
    MISPLACED: Refused.Code
    CREDIT_EXCEEDED: Refused.Code
    CHECKSUM: Refused.Code
    GAP: Refused.Code
    LEASE_EXPIRED: Refused.Code
    REVOKED: Refused.Code
    PROTOCOL: Refused.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: Refused.Code
    message: str
    def __init__(self, code: _Optional[_Union[Refused.Code, str]] = ..., message: _Optional[str] = ...) -> None: ...
