"""The page in the browser of ``peft-surgical app`` and of the Space: `peft_surgical.tune` behind buttons.

`page` alone needs Gradio. `uploads` takes what visitors send, `worker` and `runner` carry out one run at a time in a
process of its own, `outcome` reads what a run has left, `workspace` says where all that lies and what may be named, and
`handlers` are what the buttons do.
"""
