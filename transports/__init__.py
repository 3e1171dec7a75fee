"""How bytes get from rank to rank: ``tcp`` and ``memory`` set up links; the engine (``rt._fastpath``) moves data over them."""
