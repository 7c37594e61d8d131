"""The SGLang engine: LoRA training on a serving engine, in process, over HTTP, on several replicas.

engine.py    the trainer's side: probes to requests, requests to losses, the adapter for saving
client.py    how a SGLang is reached: `sgl.Engine` in this process, or servers over HTTP
plugin.py    loaded by SGLang in each of its processes: two hooks
worker.py    what the hooks drive: float32 masters, and slots written as master + scale · z
versions.py  everything that depends on SGLang's release
"""
