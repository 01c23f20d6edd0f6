"""Carry the weights of one run over to a run with another configuration.

A weight means the same in both runs if it is read for the same values of the same fields:

    rows            A row is found by the hash of a field's name and value, cut to `table_bits`.
                    With the same hash seed it stays, whichever fields came or went. A larger table
                    has each old row at every new row with the same low bits. In a smaller one
                    several old rows meet; one carries over if no other was learned.
    first layer     Its columns are inputs: coordinates of the embedding of a field, products of
                    two fields, or outer products. Columns of fields that stay keep their weights.
                    Those of new fields are zero, so the network does not see them yet.
    other layers    The units of the layer below are their inputs. A layer stays if its shape does,
                    and all layers below it.
    FTRL            With other rates, z is chosen so that the weights are the same.
    blend           Members that stay keep their weights relative to each other. New ones begin
                    with the weight 0.

A field whose values are hashed in another way (another kind, encoding, or other edges) begins anew,
as a new field does: the rows that its old values share with new ones are those of a fresh table.
The state of an optimiser follows its weights.

Nothing here reads or writes a file. Every function returns new arrays and sentences that say what
was carried over and what was not.
"""

from __future__ import annotations

from stream_ctr.events.field_changes import compare_fields
from stream_ctr.learn.carried import Carried, ModelState, anew
from stream_ctr.learn.transfer_linear import carry_linear
from stream_ctr.learn.transfer_network import carry_network
from stream_ctr.models import MODELS


def carry_over(old: ModelState, fresh: ModelState) -> Carried:
    """Return what a model begins with that was `old`, and that would be `fresh` without it.

    Both have the same `spec.model`. Arrays of `fresh` may be changed and returned.
    """
    before, now = old.schema.hash_seed, fresh.schema.hash_seed
    if before != now:
        return anew(
            fresh, f"features.hash_seed was {before} and is {now}, so every value has another row"
        )
    changes = compare_fields(old.schema, fresh.schema)
    if not changes.stay:
        return anew(fresh, "none of its fields stays")
    carry = carry_network if MODELS[fresh.spec.model].module else carry_linear
    return carry(old, fresh, changes)
