"""What a transfer says of itself."""

from kvbaton.handoff.sender import TransferReport


def test_a_report_of_what_never_happened_is_zero() -> None:
    report = TransferReport()
    assert (report.seconds, report.overlapped_share) == (0, 0)
    report = TransferReport(first_frame_ns=1_000, computed_ns=2_000, applied_ns=5_000)
    assert (report.seconds, report.overlapped_share) == (4e-6, 0.25)
