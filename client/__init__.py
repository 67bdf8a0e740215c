"""Client of a served pipeline. It knows the service's tensors and nothing else of the project."""

from client.client import Answer, AsyncClient, Client, Message, Options, Piece, ServiceError
from client.request import TokenScore

__all__ = ["Answer", "AsyncClient", "Client", "Message", "Options", "Piece", "ServiceError", "TokenScore"]
