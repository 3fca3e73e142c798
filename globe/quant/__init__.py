"""Experts coded near the rate-distortion limit. The mathematics alone: torch, and numba where it is there.

`order_inputs` and `row_costs` say what an error costs, `water_fill` gives every row its bits, `rehearse` corrects what
rows are expected to be, `code_own` and `code_shared` code them, `CodedExperts.decode` reads them,
`product.multiply` multiplies tokens by them.
"""
