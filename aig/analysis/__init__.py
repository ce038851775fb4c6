"""What a trained network learned to skip, for whom, and what that does: the paper's figures 3 to 7.

`subjects` opens networks with their images, `measures` computes, `parts` makes figures, tables and lines of that,
`figures` draws. The command is `python -m aig.analysis`.
"""
