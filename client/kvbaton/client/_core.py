"""How both clients reach a router."""

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # gRPC waits for the longer of the two, and its own default is a minute.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 16 << 20),
)
METHODS = "/kvbaton.v1.InferenceService/"
