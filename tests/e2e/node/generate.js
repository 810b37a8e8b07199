// Usage: node generate.js HOST:PORT PROTO_ROOT APPLICATION TOKEN_ID... ; prints each event as one JSON line.
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, protoRoot, application, ...ids] = process.argv.slice(2);
const definition = loader.loadSync("protos/admission.proto", {
  includeDirs: [protoRoot],
  keepCase: true,
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { slosserve } = grpc.loadPackageDefinition(definition);
const client = new slosserve.v1.Admission(address, grpc.credentials.createInsecure());

const call = client.Generate(
  {
    application,
    token_ids: { ids: ids.map(Number) },
    sampling: { max_tokens: 16, temperature: 0, ignore_eos: true },
  },
  { deadline: new Date(Date.now() + 120_000) },
);
call.on("data", (event) => console.log(JSON.stringify(event)));
call.on("error", (error) => {
  console.error(`${error.code} ${error.details}`);
  process.exitCode = 1;
});
call.on("end", () => client.close());
