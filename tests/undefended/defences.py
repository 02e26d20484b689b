"""The defences that are taken out, each by one replacement in one file, and the tests that have to fail then.

Not here: what two lines defend, each of which is enough. A token's expiry is asked when it is looked up and when it is
used; URLs of other kinds are refused by us and by httpx.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_COORDINATOR = "coordinator/cbtm_coordinator"
_ADVERSARY = "tests/fault/adversary"


@dataclass(frozen=True, kw_only=True)
class Defence:
    """`line`, found once in `path`, becomes `without`; then a test of `tests` (a file of `_ADVERSARY`) that `named`
    (pytest's -k) selects must fail.
    """

    name: str
    path: str
    line: str
    without: str
    tests: str
    named: str

    @property
    def test_path(self) -> str:
        return f"{_ADVERSARY}/{self.tests}.py"


def _of(path: str, tests: str, *rows: tuple[str, str, str, str]) -> list[Defence]:
    return [
        Defence(name=name, path=path, line=line, without=without, tests=tests, named=named)
        for name, line, without, named in rows
    ]


DEFENCES: tuple[Defence, ...] = (
    *_of(
        f"{_COORDINATOR}/services/auth.py",
        "test_identity",
        ("roles", "if principal.role not in roles:", "if False:", "one_role_s_token"),
        (
            "signatures",
            "if worker is None or key is None or not signed.is_by(bytes.fromhex(key)):",
            "if worker is None or key is None:",
            "after_a_recovery",
        ),
        (
            "replayed signatures",
            "if not identities.note_signed(tx, worker.id, key, signed.time_us):",
            "if False:",
            "good_once",
        ),
        (
            "signatures of another time",
            "if abs(signed.time_us - 1e6 * now.timestamp()) > 1e6 * _MAX_SKEW_SECONDS:",
            "if False:",
            "for_another_time",
        ),
        ("revoked workers", "if worker.state is WorkerState.REVOKED:", "if False:", "revoked_worker"),
        (
            "credentials of a key that was replaced",
            "if worker.public_key is None or key_id(bytes.fromhex(worker.public_key)) != principal.key_id:",
            "if worker.public_key is None:",
            "after_a_recovery",
        ),
    ),
    *_of(
        f"{_COORDINATOR}/store/identities.py",
        "test_identity",
        (
            "used-up tokens",
            "or_(tokens.c.max_uses == 0, tokens.c.uses < tokens.c.max_uses),",
            "",
            "past_its_right or one_machine",
        ),
    ),
    *_of(
        f"{_COORDINATOR}/storage/signing.py",
        "test_identity",
        (
            "signed URLs",
            "if not hmac.compare_digest(signature.encode(), expected.encode()) or not well_formed:",
            "if not well_formed:",
            "upload_url",
        ),
    ),
    *_of(
        f"{_COORDINATOR}/storage/http_app.py",
        "test_identity",
        ("announced length", "if int(declared) != grant.size:", "if False:", "upload_url"),
    ),
    *_of(
        f"{_COORDINATOR}/limits.py",
        "test_floods",
        ("rates", "    if wait:\n        # Whoever", "    if False:\n        # Whoever", "over_its_rate"),
        (
            "registrations of one address",
            '_check(self._registrations.take(address), "registrations", address)',
            "pass",
            "registrations_of_one_address",
        ),
        (
            "guessed credentials",
            '_check(self._refusals.wait(address), "calls with a credential that is not good", address)',
            "pass",
            "guesses_credentials",
        ),
    ),
    *_of(
        f"{_COORDINATOR}/services/interceptors.py",
        "test_floods",
        ("deadlines", "_check_deadline(method, context.time_remaining())", "pass", "without_a_deadline"),
    ),
    *_of(
        f"{_COORDINATOR}/storage/http_protocol.py",
        "test_floods",
        (
            "connections of one address",
            "if connections_per_address and open_connections[self._address] > connections_per_address:",
            "if False:",
            "connections_of_one_address",
        ),
        (
            "heads without end",
            "if self._head is not None and self._head_bytes > _MAX_HEAD_BYTES:",
            "if False:",
            "head_without_end",
        ),
        (
            "heads that never end",
            "self._head = self.loop.call_later(head_seconds, self.transport.abort)",
            "self._head = self.loop.call_later(3600, self.transport.abort)",
            "head_that_does_not_come",
        ),
    ),
    *_of(
        "common/cbtm_common/safetensors_header.py",
        "test_hostile_checkpoints",
        ("overlaps and gaps", "if entry.begin != at:", "if False:", "hostile_files"),
        (
            "sizes that lie",
            "if entry.count * ITEM_BYTES[dtype] != entry.end - entry.begin:",
            "if False:",
            "hostile_files",
        ),
    ),
    *_of(
        f"{_COORDINATOR}/structure/inspection.py",
        "test_hostile_checkpoints",
        ("NaN and infinity", "if not found.is_finite:", "if False:", "hostile_files"),
        ("shapes and types", "    if found != wanted:", "    if False:", "hostile_files"),
        (
            "missing tensors",
            "missing = next((name for name in self._expected.architecture.tensors if name not in self._found), None)",
            "missing = None",
            "hostile_files",
        ),
        ("negative squares", "if found.has_negative:", "if False:", "hostile_files"),
        ("another step's moments", "if found.sum != self._expected.step:", "if False:", "hostile_files"),
        ("configs with code", "if code is not None:", "if False:", "hostile_files"),
        ("configs of another model", "if value.get(name) != base[name]:", "if False:", "hostile_files"),
        (
            "norms, and subnormal floods",
            "        if verdict.reason:\n            raise rejected(verdict.reason, path, tensor=name",
            "        if False:\n            raise rejected(verdict.reason, path, tensor=name",
            "hostile_files",
        ),
    ),
    *_of(
        "common/cbtm_common/files.py",
        "test_hostile_coordinator",
        ("paths", "if bad or str(pure) != path:", "if False:", "out_of_its_folder or somebody_elses"),
        ("digests as paths", "if not _DIGEST.fullmatch(sha256):", "if False:", "digest_that_is_a_path"),
        ("identifiers as paths", "if not _NAME.fullmatch(identifier):", "if False:", "somebody_elses_folder"),
    ),
    *_of(
        "common/cbtm_common/transfer.py",
        "test_hostile_coordinator",
        ("redirects", "follow_redirects=False,", "follow_redirects=True,", "redirect"),
        ("other requests than a GET", "        if request.method != method:", "        if False:", "other_request"),
    ),
    *_of(
        "worker/cbtm_worker/inputs.py",
        "test_hostile_coordinator",
        ("a coordinator's code", "        if named:", "        if False:", "names_code"),
    ),
    *_of(
        f"{_COORDINATOR}/verification/evaluation.py",
        "test_behaviour",
        (
            "a seed handed back",
            "    if own.gain + slack <= needed:\n        return Outcome.FAILED,",
            "    if own.gain + slack <= needed:\n        return Outcome.PASSED,",
            "seed_handed_back",
        ),
        ("a claimed loss", "if abs(claimed - train.loss) <= allowed:", "if True:", "claimed_loss"),
    ),
    *_of(
        f"{_COORDINATOR}/verification/audits.py",
        "test_behaviour",
        ("replays", "    if replay.equal:", "    if True:", "not_trained_as_told"),
    ),
)
