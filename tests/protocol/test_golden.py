"""Golden bytes: what version 1 looks like on the wire. A change here is a new wire version, or a mistake.

A new field with a default changes no vector; a renamed, retyped or re-defaulted one does. To add a message, add it to
`GOLDEN` with the bytes that the failing test prints.
"""

from __future__ import annotations

import pytest

from pilotfish.protocol import messages as m
from pilotfish.protocol.codec import MAX_BYTES, decode, encode

SESSION, DIGEST = "0123456789abcdef" * 2, bytes(range(16))
SAMPLING = m.Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05, seed=2**64 - 1)

EVERY_FIELD: dict[str, m.Message] = {
    "verify": m.VerifyJob(
        agent="phone-1",
        boot="b7",
        session=SESSION,
        epoch=3,
        round=9,
        base=5,
        digest=DIGEST,
        offset=2,
        ids=(7, 300, 70000),
        draft=(1, 2**31 - 1),
        sampling=SAMPLING,
        stop_ids=(2,),
        deadline_ms=9000,
    ),
    "verify, a continuation with every default": m.VerifyJob(
        agent="a",
        boot="b",
        session=SESSION,
        epoch=0,
        round=0,
        base=1,
        digest=DIGEST,
        offset=0,
        ids=(0,),
        continue_tokens=64,
    ),
    "score": m.ScoreJob(
        agent="phone-1",
        boot="b7",
        session=SESSION,
        epoch=3,
        round=11,
        base=5,
        digest=DIGEST,
        offset=2,
        ids=(7, 300, 70000),
        draft=(1, 2**31 - 1),
        sampling=SAMPLING,
        deadline_ms=2000,
    ),
    "verify, watched": m.VerifyJob(
        agent="a",
        boot="b",
        session=SESSION,
        epoch=0,
        round=0,
        base=1,
        digest=DIGEST,
        offset=0,
        ids=(0,),
        logprobs=True,
        trace="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ),
    "verdict, with log-probabilities": m.Verdict(
        boot="b",
        session=SESSION,
        epoch=0,
        round=0,
        base=1,
        digest=DIGEST,
        draws=(0, 7),
        logprobs=(-0.5, -2.25),
        worker="w",
    ),
    "cancel": m.Cancel(agent="a", boot="b", session=SESSION),
    "close": m.Close(agent="a", boot="b", session=SESSION),
    "verdict": m.Verdict(
        boot="b7",
        session=SESSION,
        epoch=3,
        round=9,
        seq=1,
        last=False,
        base=5,
        digest=DIGEST,
        draws=(1, 8),
        accepted=1,
        worker="w.0",
        credit=4,
        queue_ms=0.25,
        engine_ms=12.5,
        rows=3,
        steps=1,
        cached=5,
    ),
    "verdict, with every default": m.Verdict(
        boot="b", session=SESSION, epoch=0, round=0, base=1, digest=DIGEST, draws=(0,), worker="w"
    ),
    "verdict, with the price of a row": m.Verdict(
        boot="b", session=SESSION, epoch=0, round=0, base=1, digest=DIGEST, draws=(0,), worker="w", row_ms=0.5
    ),
    "scores": m.Scores(
        boot="b7",
        session=SESSION,
        round=11,
        base=5,
        digest=DIGEST,
        draws=(1, 8, 9),
        worker="w.0",
        credit=4,
        engine_ms=12.5,
        rows=3,
        steps=1,
    ),
    "refusal": m.Refusal(
        boot="b7",
        session=SESSION,
        epoch=3,
        round=9,
        code="need_prefix",
        sentence="who is this?",
        worker="w.0",
        credit=1,
    ),
    "refusal of bytes that were no message": m.Refusal(code="invalid_message", worker="w"),
    "prompt": m.Prompt(
        request=SESSION,
        text="schön",
        raw=True,
        mode="cloud_only",
        on_cloud_loss="wait",
        max_tokens=8,
        sampling=SAMPLING,
        draft_tokens=0,
        deadline_ms=5000,
    ),
    "prompt, gated": m.Prompt(request=SESSION, text="x", mode="gated", max_disagreement=0.005),
    "cancel_request": m.CancelRequest(request=SESSION),
    "accepted": m.Accepted(request=SESSION, agent="phone-1", prompt_tokens=12, seed=2**63),
    "text": m.Text(request=SESSION, start=3, ids=(5, 6), pieces=("a", "é"), origins=("accepted", "local")),
    "finished": m.Finished(
        request=SESSION,
        reason="length",
        summary=m.Summary(
            tokens=8,
            prompt_tokens=12,
            local=1,
            accepted=4,
            corrected=2,
            continued=1,
            drafted=9,
            rounds=3,
            cloud_rows=12,
            cloud_steps=3,
            resends=1,
            degraded=True,
            seed=7,
            first_token_ms=1.5,
            total_ms=90.25,
            cloud_ms=30.0,
            draft_ms=40.0,
        ),
    ),
    "finished, gated": m.Finished(
        request=SESSION,
        reason="stop",
        summary=m.Summary(tokens=8, local=6, unverified=6, never_sent=2, audited=6, audit_disagreed=1),
    ),
    "finished, with every default": m.Finished(request=SESSION, reason="stop", summary=m.Summary()),
    "finished, partly by the cloud alone": m.Finished(
        request=SESSION, reason="stop", summary=m.Summary(tokens=9, continued=8, ceded=8)
    ),
    "failed": m.Failed(request=SESSION, code="deadline", sentence="no verdict within 120000 ms"),
}

GOLDEN: dict[str, str] = {
    "verify": (
        "8fa56167656e74a770686f6e652d31a4626f6f74a26237a773657373696f6ed92030313233343536373839616263646566303132"
        "33343536373839616263646566a565706f636803a5726f756e6409a46261736505a6646967657374c41000010203040506070809"
        "0a0b0c0d0e0fa66f666673657402a36964739307cd012cce00011170a564726166749201ce7fffffffa873616d706c696e6785ab"
        "74656d7065726174757265cb3fe6666666666666a5746f705f6b28a5746f705f70cb3feccccccccccccda56d696e5f70cb3fa999"
        "999999999aa473656564cfffffffffffffffffa873746f705f6964739102ab646561646c696e655f6d73cd2328a17601a4747970"
        "65a6766572696679"
    ),
    "verify, a continuation with every default": (
        "8ca56167656e74a161a4626f6f74a162a773657373696f6ed9203031323334353637383961626364656630313233343536373839"
        "616263646566a565706f636800a5726f756e6400a46261736501a6646967657374c410000102030405060708090a0b0c0d0e0fa6"
        "6f666673657400a36964739100af636f6e74696e75655f746f6b656e7340a17601a474797065a6766572696679"
    ),
    "score": (
        "8ea56167656e74a770686f6e652d31a4626f6f74a26237a773657373696f6ed92030313233343536373839616263646566303132"
        "33343536373839616263646566a565706f636803a5726f756e640ba46261736505a6646967657374c41000010203040506070809"
        "0a0b0c0d0e0fa66f666673657402a36964739307cd012cce00011170a564726166749201ce7fffffffa873616d706c696e6785ab"
        "74656d7065726174757265cb3fe6666666666666a5746f705f6b28a5746f705f70cb3feccccccccccccda56d696e5f70cb3fa999"
        "999999999aa473656564cfffffffffffffffffab646561646c696e655f6d73cd07d0a17601a474797065a573636f7265"
    ),
    "cancel": (
        "85a56167656e74a161a4626f6f74a162a773657373696f6ed9203031323334353637383961626364656630313233343536373839"
        "616263646566a17601a474797065a663616e63656c"
    ),
    "close": (
        "85a56167656e74a161a4626f6f74a162a773657373696f6ed9203031323334353637383961626364656630313233343536373839"
        "616263646566a17601a474797065a5636c6f7365"
    ),
    "verdict": (
        "de0013a4626f6f74a26237a773657373696f6ed92030313233343536373839616263646566303132333435363738396162636465"
        "66a565706f636803a5726f756e6409a373657101a46c617374c2a46261736505a6646967657374c410000102030405060708090a"
        "0b0c0d0e0fa56472617773920108a8616363657074656401a6776f726b6572a3772e30a663726564697404a871756575655f6d73"
        "cb3fd0000000000000a9656e67696e655f6d73cb4029000000000000a4726f777303a5737465707301a663616368656405a17601"
        "a474797065a776657264696374"
    ),
    "verdict, with every default": (
        "8aa4626f6f74a162a773657373696f6ed9203031323334353637383961626364656630313233343536373839616263646566a565"
        "706f636800a5726f756e6400a46261736501a6646967657374c410000102030405060708090a0b0c0d0e0fa564726177739100a6"
        "776f726b6572a177a17601a474797065a776657264696374"
    ),
    "verdict, with the price of a row": (
        "8ba4626f6f74a162a773657373696f6ed9203031323334353637383961626364656630313233343536373839616263646566a565"
        "706f636800a5726f756e6400a46261736501a6646967657374c410000102030405060708090a0b0c0d0e0fa564726177739100a6"
        "776f726b6572a177a6726f775f6d73cb3fe0000000000000a17601a474797065a776657264696374"
    ),
    "scores": (
        "8da4626f6f74a26237a773657373696f6ed9203031323334353637383961626364656630313233343536373839616263646566a5"
        "726f756e640ba46261736505a6646967657374c410000102030405060708090a0b0c0d0e0fa5647261777393010809a6776f726b"
        "6572a3772e30a663726564697404a9656e67696e655f6d73cb4029000000000000a4726f777303a5737465707301a17601a47479"
        "7065a673636f726573"
    ),
    "verify, watched": (
        "8da56167656e74a161a4626f6f74a162a773657373696f6ed9203031323334353637383961626364656630313233343536373839"
        "616263646566a565706f636800a5726f756e6400a46261736501a6646967657374c410000102030405060708090a0b0c0d0e0fa6"
        "6f666673657400a36964739100a86c6f6770726f6273c3a57472616365d93730302d306166373635313931366364343364643834"
        "34386562323131633830333139632d623761643662373136393230333333312d3031a17601a474797065a6766572696679"
    ),
    "verdict, with log-probabilities": (
        "8ba4626f6f74a162a773657373696f6ed9203031323334353637383961626364656630313233343536373839616263646566a565"
        "706f636800a5726f756e6400a46261736501a6646967657374c410000102030405060708090a0b0c0d0e0fa56472617773920007"
        "a86c6f6770726f627392cbbfe0000000000000cbc002000000000000a6776f726b6572a177a17601a474797065a7766572646963"
        "74"
    ),
    "refusal": (
        "8aa4626f6f74a26237a773657373696f6ed9203031323334353637383961626364656630313233343536373839616263646566a5"
        "65706f636803a5726f756e6409a4636f6465ab6e6565645f707265666978a873656e74656e6365ac77686f20697320746869733f"
        "a6776f726b6572a3772e30a663726564697401a17601a474797065a77265667573616c"
    ),
    "refusal of bytes that were no message": (
        "84a4636f6465af696e76616c69645f6d657373616765a6776f726b6572a177a17601a474797065a77265667573616c"
    ),
    "prompt": (
        "8ba772657175657374d9203031323334353637383961626364656630313233343536373839616263646566a474657874a6736368"
        "c3b66ea3726177c3a46d6f6465aa636c6f75645f6f6e6c79ad6f6e5f636c6f75645f6c6f7373a477616974aa6d61785f746f6b65"
        "6e7308a873616d706c696e6785ab74656d7065726174757265cb3fe6666666666666a5746f705f6b28a5746f705f70cb3feccccc"
        "cccccccda56d696e5f70cb3fa999999999999aa473656564cfffffffffffffffffac64726166745f746f6b656e7300ab64656164"
        "6c696e655f6d73cd1388a17601a474797065a670726f6d7074"
    ),
    "prompt, gated": (
        "86a772657175657374d9203031323334353637383961626364656630313233343536373839616263646566a474657874a178a46d"
        "6f6465a56761746564b06d61785f64697361677265656d656e74cb3f747ae147ae147ba17601a474797065a670726f6d7074"
    ),
    "cancel_request": (
        "83a772657175657374d9203031323334353637383961626364656630313233343536373839616263646566a17601a474797065ae"
        "63616e63656c5f72657175657374"
    ),
    "accepted": (
        "86a772657175657374d9203031323334353637383961626364656630313233343536373839616263646566a56167656e74a77068"
        "6f6e652d31ad70726f6d70745f746f6b656e730ca473656564cf8000000000000000a17601a474797065a86163636570746564"
    ),
    "text": (
        "87a772657175657374d9203031323334353637383961626364656630313233343536373839616263646566a5737461727403a369"
        "6473920506a670696563657392a161a2c3a9a76f726967696e7392a86163636570746564a56c6f63616ca17601a474797065a474"
        "657874"
    ),
    "finished": (
        "85a772657175657374d9203031323334353637383961626364656630313233343536373839616263646566a6726561736f6ea66c"
        "656e677468a773756d6d617279de0011a6746f6b656e7308ad70726f6d70745f746f6b656e730ca56c6f63616c01a86163636570"
        "74656404a9636f7272656374656402a9636f6e74696e75656401a76472616674656409a6726f756e647303aa636c6f75645f726f"
        "77730cab636c6f75645f737465707303a7726573656e647301a86465677261646564c3a47365656407ae66697273745f746f6b65"
        "6e5f6d73cb3ff8000000000000a8746f74616c5f6d73cb4056900000000000a8636c6f75645f6d73cb403e000000000000a86472"
        "6166745f6d73cb4044000000000000a17601a474797065a866696e6973686564"
    ),
    "finished, gated": (
        "85a772657175657374d9203031323334353637383961626364656630313233343536373839616263646566a6726561736f6ea473"
        "746f70a773756d6d61727986a6746f6b656e7308a56c6f63616c06aa756e766572696669656406aa6e657665725f73656e7402a7"
        "6175646974656406af61756469745f64697361677265656401a17601a474797065a866696e6973686564"
    ),
    "finished, with every default": (
        "85a772657175657374d9203031323334353637383961626364656630313233343536373839616263646566a6726561736f6ea473"
        "746f70a773756d6d61727980a17601a474797065a866696e6973686564"
    ),
    "finished, partly by the cloud alone": (
        "85a772657175657374d9203031323334353637383961626364656630313233343536373839616263646566a6726561736f6ea473"
        "746f70a773756d6d61727983a6746f6b656e7309a9636f6e74696e75656408a5636564656408a17601a474797065a866696e6973"
        "686564"
    ),
    "failed": (
        "85a772657175657374d9203031323334353637383961626364656630313233343536373839616263646566a4636f6465a8646561"
        "646c696e65a873656e74656e6365bb6e6f20766572646963742077697468696e20313230303030206d73a17601a474797065a666"
        "61696c6564"
    ),
}

UNIONS = (m.ToWorker, m.ToEdge, m.ToAgent, m.ToShell)


def members(union: object) -> tuple[type[m.Message], ...]:
    return tuple(getattr(union, "__args__", [union]))


def kind_of(message: m.Message) -> object:
    return next(union for union in UNIONS if type(message) in members(union))


@pytest.mark.parametrize("name", EVERY_FIELD)
def test_the_bytes_of_version_1_are_these(name: str) -> None:
    assert encode(EVERY_FIELD[name]).hex() == GOLDEN[name]


@pytest.mark.parametrize("name", EVERY_FIELD)
def test_the_bytes_of_version_1_still_read_as_what_they_meant(name: str) -> None:
    message = EVERY_FIELD[name]
    assert decode(bytes.fromhex(GOLDEN[name]), kind_of(message)) == message


def test_every_message_has_a_vector() -> None:
    on_the_wire = {member for union in UNIONS for member in members(union)}
    assert {type(message) for message in EVERY_FIELD.values()} == on_the_wire


def test_every_field_stands_in_some_vector() -> None:
    for kind in {type(message) for message in EVERY_FIELD.values()}:
        used = set[str]().union(*(x.model_dump(exclude_defaults=True) for x in EVERY_FIELD.values() if type(x) is kind))
        assert used | {"type"} >= set(kind.model_fields), kind


@pytest.mark.parametrize("name", EVERY_FIELD)
def test_a_vector_is_small(name: str) -> None:
    assert len(GOLDEN[name]) // 2 < 400 < MAX_BYTES
