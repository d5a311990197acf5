"""/tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from vattention.errors import RequestError
from vattention.server.protocol_tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from vattention.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        if body.prompt is None:
            token_ids = await service.render(body)
        else:
            special = body.add_special_tokens is not False
            token_ids = await service.encode(body.prompt, add_special_tokens=special)
        response: TokenizeResponse = {
            "count": len(token_ids),
            "max_model_len": service.engine.max_model_len,
            "tokens": token_ids,
        }
        if body.return_token_strs:
            response["token_strs"] = [service.tokenizer.token_text(token_id) for token_id in token_ids]
        return JSONResponse(response)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        tokenizer = service.tokenizer
        wrong = next((token for token in body.tokens if token >= tokenizer.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"{wrong} is not a token id of this model", param="tokens")
        text = await service.in_worker(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False))
        response: DetokenizeResponse = {"prompt": text}
        return JSONResponse(response)

    return router
