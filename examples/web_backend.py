"""A web backend that enqueues prompts and shows what became of them. Needs neither torch nor a GPU.

    python examples/web_backend.py 8080
    curl -d '["def add(a, b):", "def sub(a, b):"]' localhost:8080/jobs      -> {"job": "3f9a...", "lines": 2}
    curl localhost:8080/jobs/3f9a...                                        -> {"state": "finished", "ok": 2, ...}
    curl localhost:8080/jobs/3f9a.../results                                one JSON object per line, as they land
    curl -d '"def add(a, b):"' localhost:8080/ask                           one prompt, answered while you wait

`application` is plain WSGI, so any server with threads runs it. The system behind it is the one that the MILLRACE_*
variables or a millrace.toml name; a worker must be running there.
"""

import json
import sys
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer, make_server

from producer import Client
from producer.result_line import encode_result
from protocol.errors import CallerError, JobNotFound, TimedOut, Unavailable
from protocol.sampling import SamplingParams

PARAMS = SamplingParams(max_tokens=64, temperature=0)
#: Seconds a browser is made to wait.
PATIENCE_S = 30

#: One for all threads of the process.
client = Client()


def enqueue(body):
    job = client.submit(json.loads(body), params=PARAMS)
    return {"job": job.id, "lines": job.num_lines}


def show(job_id):
    status = client.status(job_id)
    return {"state": status.job.state, "lines": status.num_lines, "ok": status.num_ok, "errors": status.num_error}


def ask(body):
    result = client.ask(json.loads(body), params=PARAMS, timeout_s=PATIENCE_S)
    return json.loads(encode_result(result))


def application(environ, start_response):
    def reply(status, content):
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(content).encode() + b"\n"]

    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    path = environ["PATH_INFO"].strip("/").split("/")
    try:
        match environ["REQUEST_METHOD"], path:
            case "POST", ["jobs"]:
                return reply("202 Accepted", enqueue(body))
            case "GET", ["jobs", job_id]:
                return reply("200 OK", show(job_id))
            case "GET", ["jobs", job_id, "results"]:
                results = client.results(client.find(job_id), order="finished")
                start_response("200 OK", [("Content-Type", "application/x-ndjson")])
                return (encode_result(result) for result in results)
            case "POST", ["ask"]:
                return reply("200 OK", ask(body))
        return reply("404 Not Found", {"error": "unknown address"})
    except JobNotFound as error:
        return reply("404 Not Found", {"error": str(error)})
    except TimedOut as error:
        return reply("504 Gateway Timeout", {"error": str(error)})
    except (CallerError, ValueError, TypeError) as error:
        return reply("400 Bad Request", {"error": str(error)})
    except Unavailable as error:
        return reply("503 Service Unavailable", {"error": str(error)})


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit("usage: web_backend.py PORT")
    with make_server("127.0.0.1", int(sys.argv[1]), application, Server) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()
