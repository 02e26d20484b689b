# docker build -f infra/coordinator.Dockerfile -t cbtm-coordinator .
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY coordinator coordinator
COPY worker worker
COPY client client
RUN pip install --no-cache-dir -c constraints.txt '.[coordinator]' && useradd --create-home --uid 10001 cbtm
USER cbtm
ENV CBTM_DATA_DIR=/home/cbtm/data
VOLUME /home/cbtm/data
EXPOSE 50051 8080
# `init` does nothing to a folder that is ready.
CMD ["sh", "-c", "cbtm-coord init && exec cbtm-coord serve"]
