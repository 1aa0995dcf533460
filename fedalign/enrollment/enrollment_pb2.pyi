from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Versions(_message.Message):
    __slots__ = ("fedalign", "flwr", "python")
    FEDALIGN_FIELD_NUMBER: _ClassVar[int]
    FLWR_FIELD_NUMBER: _ClassVar[int]
    PYTHON_FIELD_NUMBER: _ClassVar[int]
    fedalign: str
    flwr: str
    python: str
    def __init__(self, fedalign: _Optional[str] = ..., flwr: _Optional[str] = ..., python: _Optional[str] = ...) -> None: ...

class EnrollRequest(_message.Message):
    __slots__ = ("token", "public_key", "proof", "site", "versions")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    token: str
    public_key: str
    proof: bytes
    site: str
    versions: Versions
    def __init__(self, token: _Optional[str] = ..., public_key: _Optional[str] = ..., proof: _Optional[bytes] = ..., site: _Optional[str] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ...) -> None: ...

class ChallengeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ChallengeReply(_message.Message):
    __slots__ = ("challenge",)
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    def __init__(self, challenge: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("challenge", "old_public_key", "new_public_key", "signature", "proof", "versions")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    OLD_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    NEW_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    old_public_key: str
    new_public_key: str
    signature: bytes
    proof: bytes
    versions: Versions
    def __init__(self, challenge: _Optional[bytes] = ..., old_public_key: _Optional[str] = ..., new_public_key: _Optional[str] = ..., signature: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., versions: _Optional[_Union[Versions, _Mapping]] = ...) -> None: ...

class Enrolled(_message.Message):
    __slots__ = ("site", "group", "gateway", "ca_certificate")
    SITE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    CA_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    site: str
    group: str
    gateway: str
    ca_certificate: bytes
    def __init__(self, site: _Optional[str] = ..., group: _Optional[str] = ..., gateway: _Optional[str] = ..., ca_certificate: _Optional[bytes] = ...) -> None: ...
